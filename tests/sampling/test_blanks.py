from __future__ import annotations

import pytest

from unmask.errors import SamplingError
from unmask.sampling.blanks import Blank, lengths_to_try, parse, spread


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The capital of {blank:4} is Paris.", ["The capital of ", Blank(4, 4), " is Paris."]),
        ("{blank:1}{blank: 2 - 3 }", ["", Blank(1, 1), "", Blank(2, 3), ""]),
        ("write {{blank:4}} for {blank:4}", ["write {blank:4} for ", Blank(4, 4), ""]),
        ("{{blank}} {{{blank:4}}} {blank:2}", ["{blank} {{blank:4}} ", Blank(2, 2), ""]),
        ("f{x} {blanket:3} {blank:2}", ["f{x} {blanket:3} ", Blank(2, 2), ""]),
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
        ("{blank:5-3}", "{blank:5-3} needs a length"),
        ("{blank}", "{blank} needs a length"),
        ("{blank:many}", "for this text itself write {{blank:many}}"),
        ("{blank:1-2}" * 4, "4 blanks of unknown length are too many"),
    ],
)
def test_what_is_no_blank_is_refused_with_the_remedy(text, says):
    with pytest.raises(SamplingError) as error:
        parse(text, "text 0")
    assert says in str(error.value)


def test_lengths_are_all_tried_or_spread_over_the_range():
    assert lengths_to_try([Blank(3, 3), Blank(5, 5)]) == [(3, 5)]
    assert lengths_to_try([Blank(3, 3), Blank(1, 4)]) == [(3, 1), (3, 2), (3, 3), (3, 4)]
    assert [length for (length,) in lengths_to_try([Blank(1, 50)])] == [1, 8, 15, 22, 29, 36, 43, 50]
    assert len(lengths_to_try([Blank(1, 50), Blank(2, 9)])) == 16
    assert len(lengths_to_try([Blank(1, 50)] * 3)) == 8
    assert spread(1, 3, 2) == [1, 3] and spread(4, 4, 1) == [4]
