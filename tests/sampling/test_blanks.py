from __future__ import annotations

import pytest

from unmask.errors import SamplingError
from unmask.sampling.blanks import Blank, parse


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The capital of {blank:4} is Paris.", ["The capital of ", Blank(4), " is Paris."]),
        ("{blank:1}{blank: 2 }", ["", Blank(1), "", Blank(2), ""]),
        ("write {{blank:4}} for {blank:4}", ["write {blank:4} for ", Blank(4), ""]),
        ("{{blank}} {{{blank:4}}} {blank:2}", ["{blank} {{blank:4}} ", Blank(2), ""]),
        ("f{x} {blanket:3} {blank:2}", ["f{x} {blanket:3} ", Blank(2), ""]),
    ],
)
def test_texts_and_blanks_alternate(text, pieces):
    assert parse(text, "text 0") == pieces


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no gap", "text 0: there is no blank in it; write {blank:N}"),
        ("{{blank:4}}", "there is no blank"),
        ("{blank:0}", "{blank:0} needs a length of 1 to 999999999"),
        ("{blank:9999999999}", "{blank:9999999999} needs a length of 1 to 999999999"),
        ("{blank:-2}", "{blank:-2} needs a length"),
        ("{blank:2-6}", "{blank:2-6} needs a length"),
        ("{blank}", "{blank} needs a length"),
        ("{blank:many}", "for this text itself write {{blank:many}}"),
    ],
)
def test_what_is_no_blank_is_refused_with_the_remedy(text, says):
    with pytest.raises(SamplingError) as error:
        parse(text, "text 0")
    assert says in str(error.value)
