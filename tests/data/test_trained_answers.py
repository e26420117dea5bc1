"""Which answers of a conversation train (`dataset.answers`), and that nothing behind them does anything."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.exchanged import together
from unmask.config.data import DataloaderConfig, DatasetConfig, resolve_answers
from unmask.config.reader import read_section
from unmask.data.chat import ChatTemplate
from unmask.data.check import count_later_turns
from unmask.data.conversation import Conversation, Message
from unmask.data.encode import Dropped, EncodedRow, RememberedRows, RowEncoder
from unmask.data.loader import TrainLoader
from unmask.data.sources import open_rows
from unmask.data.template_loading import load_template
from unmask.data.template_source import read_template
from unmask.errors import ConfigError, DataError

REPORTS = Path(__file__).parents[1] / "fixtures" / "reports"
TEMPLATES = [(name, tagged) for name in ("llada", "diffusion_gemma") for tagged in (True, False)]
CHAT = tuple(Message(role, text) for role, text in zip(("user", "assistant") * 3, "abcdef", strict=True))
TURNS = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "assistant", "system"]),
        st.text(max_size=6) | st.sampled_from(["<|eot_id|>", "4<turn|>\n"]),
        supervised=st.sampled_from([None, None, True, False]),
    ),
    max_size=6,
)


class Held:
    """Rows that lie in memory."""

    fingerprint = "held"
    skipped: tuple[str, ...] = ()

    def __init__(self, *rows: tuple[Message, ...]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        return Conversation(self.rows[index])

    def text_length(self, index: int) -> int:
        return sum(len(message.content) for message in self.rows[index])

    def describe(self, index: int) -> str:
        return f"row {index}"


def encoder(template: ChatTemplate, answers: Any, *rows: tuple[Message, ...], **changes) -> RowEncoder:
    return RowEncoder(Held(*rows), template, DatasetConfig("rows.jsonl", answers=answers, **changes), seed=7)


def trained(row: EncodedRow | Dropped, template: ChatTemplate) -> list[str]:
    """Return the supervised stretches, decoded."""
    assert isinstance(row, EncodedRow)
    text = "".join(chr(0xE000 + i) if s else "|" for i, s in zip(row.input_ids.tolist(), row.supervised, strict=True))
    return [template.tokenizer.decode([ord(c) - 0xE000 for c in part]) for part in text.split("|") if part]


def same(a: EncodedRow | Dropped, b: EncodedRow | Dropped) -> bool:
    if isinstance(a, Dropped) or isinstance(b, Dropped):
        return a == b
    return a.input_ids.tolist() == b.input_ids.tolist() and a.supervised.tolist() == b.supervised.tolist()


@pytest.fixture
def make(tokenizer, gemma_tokenizer):
    """Return a function that loads one of TEMPLATES."""

    def load(name: str, tagged: bool) -> ChatTemplate:
        own = tokenizer if name == "llada" else gemma_tokenizer
        if tagged:
            return load_template(own, name)
        own.chat_template = re.sub(r"\{%-? *(end)?generation *-?%\}", "", read_template(name))
        return load_template(own)

    return load


@pytest.fixture
def template(tokenizer) -> ChatTemplate:
    return load_template(tokenizer, "llada")


def test_each_value_trains_what_it_says(template):
    def answers(value: str, epoch: int = 0) -> list[str]:
        return trained(encoder(template, value, CHAT)(0, epoch), template)

    assert answers("all") == ["b<|eot_id|>", "d<|eot_id|>", "f<|eot_id|>"]
    assert answers("last") == ["f<|eot_id|>"]
    assert {text for epoch in range(20) for text in answers("one", epoch)} == {
        "b<|eot_id|>",
        "d<|eot_id|>",
        "f<|eot_id|>",
    }
    assert all(len(answers("one", epoch)) == 1 for epoch in range(20))


@pytest.mark.parametrize("value", ["all", "last", "one"])
def test_a_turn_behind_the_last_answer_is_not_in_the_text(value, template):
    rows = open_rows(DatasetConfig(str(REPORTS / "trailing_user.jsonl")))
    encode = RowEncoder(rows, template, DatasetConfig("rows.jsonl", answers=value))
    for index in range(len(rows)):
        row = encode(index, 0)
        assert isinstance(row, EncodedRow)
        assert trained(row, template) == ["Paris<|eot_id|>"] and row.supervised[-1]
        assert template.tokenizer.decode(row.input_ids).count("Paris") == 1


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(TEMPLATES), turns=TURNS, later=TURNS, epoch=st.integers(0, 3))
def test_nothing_behind_a_supervised_answer_changes_a_row(make, kind, turns, later, epoch):
    template = make(*kind)
    turns = [Message("user", "hello"), *turns, Message("user", "q"), Message("assistant", "a")]
    unsupervised = [replace(message, supervised=False) for message in later]
    if unsupervised:  # an assistant turn right behind the answer would be part of it
        unsupervised.insert(0, Message("user", "so a"))
    for value in ("all", "last", "one"):
        try:
            plain = encoder(template, value, tuple(turns))(0, epoch)
        except DataError as error:
            assert "joins assistant turns" in str(error)  # and some of them train
            return
        assert isinstance(plain, EncodedRow) and plain.supervised[-1]
        assert same(plain, encoder(template, value, (*turns, *unsupervised))(0, epoch))
        if value != "one":
            continue
        # Whichever answer is drawn, its row is that of the conversation that ends with it.
        ends = [answer.stop for answer in template.answers(turns)]
        cut = [encoder(template, "last", tuple(turns[:end]))(0, 0) for end in ends]
        assert any(same(plain, row) for row in cut)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(TEMPLATES), turns=TURNS)
def test_what_precedes_the_one_answer_is_the_prompt_that_asks_for_it(make, kind, turns):
    template = make(*kind)
    turns = [Message("user", "hello"), *(replace(message, supervised=None) for message in turns)]
    for answer in template.answers(turns):
        encoded = template.encode(turns[: answer.stop], last_only=True)
        prompt = template.encode_prompt(turns[: answer.start])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.supervised == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))


@pytest.mark.parametrize("name", ["chatml", "qwen3like", "alternating"])
def test_one_answer_is_asked_for_as_it_is_trained_with_templates_of_others(tokenizer, name):
    template = load_template(tokenizer, str(REPORTS / f"{name}.jinja"))
    encode = encoder(template, "one", CHAT)
    prompts = [template.encode_prompt(CHAT[: answer.start]) for answer in template.answers(CHAT)]
    drawn = set()
    for epoch in range(20):
        row = encode(0, epoch)
        assert isinstance(row, EncodedRow) and row.supervised[-1]
        asked = row.input_ids[~row.supervised].tolist()
        drawn.add(prompts.index(asked))
        assert row.input_ids[: len(asked)].tolist() == asked
    assert drawn == {0, 1, 2}


def test_what_a_template_writes_behind_an_answer_is_not_in_the_text(tokenizer):
    # Where the answer ends would be seen from it.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "<|eot_id|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}the end"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = load_template(tokenizer)
    encoded = template.encode(CHAT[:2])
    assert tokenizer.decode(encoded.ids) == "[user]a[assistant]b<|eot_id|>"


def test_the_draw_is_uniform_and_depends_on_seed_epoch_and_row_alone(template):
    encode = encoder(template, "one", *[CHAT] * 50)
    drawn = [[trained(encode(index, epoch), template)[0] for index in range(50)] for epoch in range(6)]
    counts = Counter(text for epoch in drawn for text in epoch)
    assert len(counts) == 3 and all(70 < count < 130 for count in counts.values())  # 100 ± 8 a standard deviation
    assert len({tuple(epoch) for epoch in drawn}) == 6
    again = replace(encode, rows=Held(*[CHAT] * 20))
    assert [trained(again(index, 4), template)[0] for index in (19, 3)] == [drawn[4][19], drawn[4][3]]
    other = replace(encode, seed=8)
    assert [trained(other(index, 0), template)[0] for index in range(50)] != drawn[0]


def test_an_answer_beyond_seq_length_is_never_drawn(template):
    room = len(template.encode(CHAT[:4]).ids)
    encode = encoder(template, "one", CHAT, seq_length=room)
    seen = {trained(encode(0, epoch), template)[0] for epoch in range(20)}
    assert seen == {"b<|eot_id|>", "d<|eot_id|>"}
    short = encoder(template, "one", CHAT, seq_length=5)
    assert all(short(0, epoch) == Dropped("no supervised token within seq_length") for epoch in range(5))
    whole = encoder(template, "one", CHAT, seq_length=5, truncation=False)
    assert whole(0, 0) == Dropped("longer than seq_length, and truncation is off")


def test_a_row_that_the_template_refuses_is_refused_whichever_answer_is_drawn(tokenizer, tmp_path):
    rule = "{% for m in messages if m['content'] == 'f' %}{{ raise_exception('no f') }}{% endfor %}"
    (tmp_path / "strict.jinja").write_text(rule + read_template("llada"))
    encode = encoder(load_template(tokenizer, str(tmp_path / "strict.jinja")), "one", CHAT)
    for epoch in range(5):
        with pytest.raises(DataError, match="row 0: .*no f"):
            encode(0, epoch)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_a_row_excludes_never_trains(make, kind):
    template = make(*kind)
    rows = [
        tuple(replace(message, supervised=False) if number in off else message for number, message in enumerate(CHAT))
        for off in ((1,), (5,), (1, 5), (1, 3, 5))
    ]

    def answers(value: str, row: int) -> list[str]:
        return sorted(
            {
                text[0]
                for epoch in range(12)
                for text in trained(encoder(template, value, rows[row])(0, epoch), template)
            }
        )

    assert [answers("all", row) for row in range(3)] == [["d", "f"], ["b", "d"], ["d"]]
    assert [answers("one", row) for row in range(3)] == [["d", "f"], ["b", "d"], ["d"]]
    assert [answers("last", row) for row in range(3)] == [["f"], ["d"], ["d"]]
    assert isinstance(encoder(template, "one", rows[3])(0, 0), Dropped)


def test_assistant_turns_in_a_row_are_the_answers_that_the_template_writes(make):
    turns = (*CHAT[:2], replace(CHAT[1], content="c"), *CHAT[2:4])
    for tagged in (True, False):
        joined, apart = make("diffusion_gemma", tagged), make("llada", tagged)
        assert joined.answers(turns) == [range(1, 3), range(4, 5)]
        assert apart.answers(turns) == [range(1, 2), range(2, 3), range(4, 5)]
        mixed = (*turns[:2], replace(turns[2], supervised=False), *turns[3:])
        with pytest.raises(
            DataError,
            match="joins assistant turns in a row, of which some",
        ):
            joined.encode(mixed)
        assert trained(encoder(apart, "all", mixed)(0, 0), apart) == ["b<|eot_id|>", "d<|eot_id|>"]


def test_tags_in_several_parts_of_an_answer_are_all_its_own(tokenizer, tmp_path):
    once = "message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}"
    twice = "message['content'] -}}{%- endgeneration -%}!{%- generation -%}{{- '<|eot_id|>' -}}{%- endgeneration -%}"
    source = read_template("llada").replace(once, twice)
    (tmp_path / "twice.jinja").write_text(source)
    template = load_template(tokenizer, str(tmp_path / "twice.jinja"))
    assert trained(encoder(template, "last", CHAT)(0, 0), template) == ["f", "<|eot_id|>"]
    some = (CHAT[0], replace(CHAT[1], supervised=False), *CHAT[2:])
    assert trained(encoder(template, "all", some)(0, 0), template) == ["d", "<|eot_id|>", "f", "<|eot_id|>"]


def test_rows_with_one_answer_are_encoded_once_and_others_in_each_epoch(template):
    calls: Counter[int] = Counter()
    encode = encoder(template, "one", CHAT, CHAT[:2])

    def counted(index: int, epoch: int) -> EncodedRow | Dropped:
        calls[index] += 1
        return encode(index, epoch)

    rows = RememberedRows(counted)
    for epoch in range(8):
        for index in (0, 1):
            assert same(rows(index, epoch), encode(index, epoch))
    assert calls == {0: 8, 1: 1}


def test_ranks_and_a_resume_see_the_same_draws(template):
    rows = [CHAT[:2], CHAT, CHAT[:4]] * 6
    encode = encoder(template, "one", *rows)

    def loader(**ranks) -> TrainLoader:
        return TrainLoader(
            encode.rows,
            encode,
            config=DataloaderConfig(),
            global_batch_size=4,
            local_batch_size=2,
            seed=1,
            pad_token_id=0,
            supervise_padding=False,
            **ranks,
        )

    def seen(steps: list) -> list:
        rows = [[(batch, i) for batch in step for i in range(len(batch.sample_ids_B))] for step in steps]
        return [
            sorted((int(b.sample_ids_B[i]), b.input_ids_BL[i][b.attention_mask_BL[i]].tolist()) for b, i in step)
            for step in rows
        ]

    whole = loader()
    steps = iter(whole)
    first = list(islice(steps, 5))
    state = json.loads(json.dumps(whole.state_dict()))
    expected = seen(first) + seen(list(islice(steps, 7)))
    two = [[*a, *b] for a, b in zip(*together(loader, 2, 12), strict=True)]
    assert seen(two) == expected
    resumed = loader()
    resumed.load_state_dict(state)
    assert seen(list(islice(resumed, 7))) == expected[5:]


@pytest.mark.parametrize(
    "given, attention, chosen",
    [
        ({}, "bidirectional", "one"),
        ({}, "block_causal", "all"),
        ({}, "canvas", "all"),
        ({"answers": "all"}, "bidirectional", "all"),
        ({"mask_history": True}, "canvas", "last"),
        ({"mask_history": True, "answers": "last"}, "bidirectional", "last"),
        ({"mask_history": False}, "bidirectional", "all"),
    ],
)
def test_what_is_not_said_follows_from_the_attention(given, attention, chosen):
    section = read_section(DatasetConfig, {"path_or_dataset_id": "rows.jsonl", **given}, "dataset")
    assert resolve_answers(section, attention).answers == chosen


@pytest.mark.parametrize(("masked", "answers"), [(True, "all"), (True, "one"), (False, "last"), (False, "one")])
def test_contradictions_are_refused(masked, answers):
    values = {"path_or_dataset_id": "rows.jsonl", "mask_history": masked, "answers": answers}
    with pytest.raises(
        ConfigError, match=f"^dataset.answers: '{answers}' contradicts mask_history: {str(masked).lower()}"
    ):
        read_section(DatasetConfig, values, "dataset")


def test_answers_that_see_later_turns_are_counted(template):
    rows = [CHAT, CHAT[:2], (*CHAT[:2], CHAT[0]), (CHAT[0], replace(CHAT[1], supervised=False), *CHAT[2:4])]
    count = count_later_turns(Held(*rows), template)
    assert (count.rows, count.answers, count.followed) == (4, 6, 2)
    part = count_later_turns(Held(*[CHAT] * 9), template, most_rows=4)
    assert (part.rows, part.answers, part.followed) == (3, 9, 6)
