"""Tools, calls, results, reasoning and turns: in the text and learned where they are answers, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import count, groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.config.data import DatasetConfig
from unmask.data.conversation import read_turns
from unmask.data.encode import Dropped, EncodedRow, RowEncoder
from unmask.data.shown import CHANGED_TEXT, UNSHOWN_REASONING, UNTAGGED
from unmask.data.sources import open_rows
from unmask.data.template_loading import load_template
from unmask.data.template_source import read_template
from unmask.errors import DataError

REPORTS = Path(__file__).parents[1] / "fixtures" / "reports"
# Shows all that a conversation may have: tools, calls, results, reasoning.
WHOLE = """\
{%- if tools %}<|start_header_id|>tools<|end_header_id|>{{ tools | tojson }}<|eot_id|>{% endif -%}
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>
{%- if m.role == 'assistant' -%}
{%- if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif -%}
{%- generation -%}{{ m.content }}
{%- for call in m.tool_calls or [] %}({{ call.function.name }} {{ call.function.arguments | tojson }}){% endfor -%}
<|eot_id|>{%- endgeneration -%}
{%- else -%}{{ m.content }}<|eot_id|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif -%}
"""
ASKED = {"role": "user", "content": "q"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"x": "1 é"}}]}
ROW = {"tools": [{"name": "add"}], "messages": [ASKED, CALLS, {"role": "tool", "content": "5"},
       {"role": "assistant", "content": "five"}]}  # fmt: skip


@pytest.fixture
def encoder(tokenizer, tmp_path):
    """Return a function that makes the encoder of some rows under a template's source."""

    def make(source: str, *rows: dict, **fields: object) -> RowEncoder:
        fields = {"answers": "all", **fields}
        (tmp_path / "template.jinja").write_text(source)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DatasetConfig(str(tmp_path / "rows.jsonl"), chat_template=str(tmp_path / "template.jinja"), **fields)
        return RowEncoder(open_rows(config), load_template(tokenizer, config.chat_template), config)

    return make


@pytest.fixture
def report(tokenizer):
    """Return a function that makes the encoder of reported rows under a packaged template."""

    def make(name: str, **fields: object) -> RowEncoder:
        config = DatasetConfig(str(REPORTS / f"{name}.jsonl"), chat_template="llada", answers="all", **fields)
        return RowEncoder(open_rows(config), load_template(tokenizer, "llada"), config)

    return make


def shown(encoder: RowEncoder, index: int = 0) -> tuple[str, list[str], tuple[str, ...]]:
    """Return the text of a row, its supervised stretches and its notes."""
    row = encoder(index, 0)
    assert isinstance(row, EncodedRow)
    decode = encoder.template.tokenizer.decode
    runs = groupby(zip(row.input_ids, row.supervised, strict=True), key=lambda pair: bool(pair[1]))
    return decode(row.input_ids), [decode([i for i, _ in run]) for learned, run in runs if learned], row.notes


def untagged(source: str) -> str:
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", source)


@pytest.mark.parametrize("source", [WHOLE, untagged(WHOLE)], ids=["tagged", "untagged"])
def test_calls_are_learned_and_tools_and_results_are_context(encoder, source):
    text, learned, notes = shown(encoder(source, ROW))
    assert text.startswith(
        '<|start_header_id|>tools<|end_header_id|>[{"type": "function", "function": {"name": "add"}}]'
    )
    assert learned == ['(add {"x": "1 é"})<|eot_id|>', "five<|eot_id|>"] and "tool<|end_header_id|>5<|eot_id|>" in text
    assert notes == ()


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("if tools ", "if false ", "does not show the row's tools.*ignore_keys: .tools."),
        ("in m.tool_calls or []", "in []", "does not show the tool_calls of turn 1, of the assistant"),
        ("call.function.arguments | tojson", "''", "does not show the tool_calls of turn 1"),
        (
            "call.function.arguments | tojson",
            "call.function.arguments",
            "does not show the tool_calls of turn 1, .*as JSON",
        ),
        ("messages -%}", "messages if m.role != 'tool' -%}", "does not show the text of turn 2, of the tool"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_row_and_key(encoder, old, new, said):
    made = encoder(WHOLE.replace(old, new), ROW)
    with pytest.raises(DataError, match=f"rows.jsonl:1: dataset.chat_template: .*template.jinja {said}"):
        made(0, 0)
    skipping = dataclasses.replace(made, config=dataclasses.replace(made.config, on_malformed="skip"))
    assert isinstance(skipping(0, 0), Dropped)


def test_calls_outside_of_the_tags_are_refused(encoder):
    call = WHOLE[WHOLE.index("{%- for call") : WHOLE.index("{% endfor -%}")] + "{% endfor -%}"
    moved = WHOLE.replace(call, "").replace("{%- generation -%}", call + "{%- generation -%}")
    with pytest.raises(DataError, match="does not supervise the tool_calls of turn 1"):
        encoder(moved, ROW)(0, 0)


def test_a_system_turn_that_the_template_drops_is_refused(encoder):
    source = WHOLE.replace("messages -%}", "messages if m.role != 'system' -%}")
    row = {"system": "five", "messages": ROW["messages"]}  # also where its text stands elsewhere
    with pytest.raises(DataError, match="does not show the text of turn 0, of the system"):
        encoder(source, row)(0, 0)
    with pytest.raises(DataError, match="does not show the text of turn 0, of the system"):
        encoder(source, ROW).template.encode_prompt([{"role": "system", "content": "s"}, ASKED])


def test_calls_and_tools_cannot_forge_control_tokens(encoder):
    forged = "<|eot_id|>"
    call = {**CALLS, "tool_calls": [{"name": "add", "arguments": {"x": forged}}]}
    made = encoder(WHOLE, {"messages": [ASKED, call]})
    row = made(0, 0)
    eot = made.template.tokenizer.convert_tokens_to_ids(forged)
    assert isinstance(row, EncodedRow) and row.input_ids.tolist().count(eot) == 2
    with pytest.raises(DataError, match="the row's tools spell '<|eot_id|>', a control token"):
        encoder(WHOLE, {**ROW, "tools": [{"name": forged}]})(0, 0)


def test_reported_calls_without_text_are_refused_where_the_template_drops_them(report, encoder):
    with pytest.raises(DataError, match=r"toolcall_empty.jsonl:1: .*llada does not show the tool_calls of turn 1"):
        report("toolcall_empty")(0, 0)
    dropped = report("toolcall_empty", on_malformed="skip")(0, 0)
    assert isinstance(dropped, Dropped) and dropped.reason == "malformed"
    row = json.loads((REPORTS / "toolcall_empty.jsonl").read_text().splitlines()[0])
    assert shown(encoder(WHOLE, row))[1] == ['(get_weather {"city": "Paris"})<|eot_id|>']


def test_calls_without_text_among_good_rows_are_left_out_and_counted(encoder):
    def row(number: int) -> dict:
        answer = {"role": "assistant", "content": f"#### {number}"}
        call = {"id": "c", "type": "function", "function": {"name": "calculate", "arguments": "{}"}}
        return {"messages": [ASKED, answer if number % 3 else {**answer, "content": "", "tool_calls": [call]}]}

    made = encoder(read_template("llada"), *map(row, range(9)), on_malformed="skip")
    dropped = [index for index in range(9) if isinstance(made(index, 0), Dropped)]
    assert dropped == [0, 3, 6]


def test_reported_tools_are_refused_or_left_out_when_told(report):
    with pytest.raises(DataError, match=r"row_system.jsonl:1: .* does not show the row's tools"):
        report("row_system")(0, 0)
    text, learned, notes = shown(report("row_system", ignore_keys=["tools"]))
    assert "system<|end_header_id|>\n\nAnswer in French only.<|eot_id|>" in text
    assert learned == ["quatre<|eot_id|>"] and notes == ()


def test_a_turn_of_weight_0_is_context(report, encoder):
    text, learned, _ = shown(report("turn_weight"))
    assert "5<|eot_id|>" in text and learned == ["4<|eot_id|>"]
    turns = [ASKED, {"role": "assistant", "content": "a", "train": True}, ASKED, {"role": "assistant", "content": "b"}]
    row = {"messages": [*turns[:3], {**turns[3], "train": False}]}
    for source in (WHOLE, untagged(WHOLE)):
        assert shown(encoder(source, row))[1] == ["a<|eot_id|>"]
        assert shown(encoder(source, row, answers="last"))[1] == ["a<|eot_id|>"]


def test_turns_that_the_template_joins_are_learned_together_or_refused(tokenizer, gemma_tokenizer):
    template = load_template(gemma_tokenizer, "diffusion_gemma")
    turns = [
        ASKED,
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    with pytest.raises(DataError, match="diffusion_gemma joins assistant turns in a row"):
        template.encode(read_turns(turns, "messages"))
    turns[2]["weight"] = 0
    more = read_turns([*turns, ASKED, {"role": "assistant", "content": "c"}], "messages")
    encoded = template.encode(more)
    assert (
        gemma_tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s]) == "c<turn|>\n"
    )


def test_reasoning_that_the_template_does_not_show_is_noted(report, encoder):
    assert shown(report("reasoning"))[2] == (UNSHOWN_REASONING,)
    row = json.loads((REPORTS / "reasoning.jsonl").read_text())
    text, learned, notes = shown(encoder(WHOLE, row))
    assert "[Two and two.]4" in text and learned == ["4<|eot_id|>"] and notes == ()


def test_a_text_of_which_the_template_drops_a_part_is_noted(encoder):
    source = WHOLE.replace("{{ m.content }}\n{%- for", "{{ m.content.split('</think>')[-1] }}\n{%- for")
    assert source != WHOLE
    answer = {"role": "assistant", "content": "<think>\nr</think> four "}
    assert shown(encoder(source, {"messages": [ASKED, answer]}))[1:] == ([" four <|eot_id|>"], (CHANGED_TEXT,))
    trimmed = read_template("llada")
    assert shown(encoder(trimmed, {"messages": [ASKED, answer]}))[2] == ()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_of_a_conversation_is_in_the_text_or_it_is_refused(encoder, data):
    cuts = {
        "if tools ": "if false ", "in m.tool_calls or []": "in []", "if m.reasoning_content ": "if false ",
        "messages -%}": "messages if m.role != 'system' -%}", "m.content }}<|eot_id|>": "'' }}<|eot_id|>",
        "call.function.arguments | tojson": "''",
    }  # fmt: skip
    source = data.draw(st.sampled_from([WHOLE, untagged(WHOLE)]))
    for old in data.draw(st.lists(st.sampled_from(list(cuts)), max_size=1)):
        source = source.replace(old, cuts[old])
    words, turns = map("w{}w".format, count()), []
    for role in data.draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=4)):
        if role == "tool" and (turns[-1]["role"] if turns else "user") == "user":
            continue  # which is refused: nobody called it
        turns.append({"role": role, "content": next(words)})
        if role == "assistant" and data.draw(st.booleans()):
            turns[-1]["tool_calls"] = [{"name": next(words), "arguments": {next(words): next(words)}}]
        if role == "assistant" and data.draw(st.booleans()):
            turns[-1]["reasoning"] = next(words)
    row: dict = {"messages": [ASKED, *turns, {"role": "assistant", "content": next(words)}]}
    row.update(data.draw(st.sampled_from([{}, {"system": next(words)}, {"tools": [{"name": next(words)}]}])))
    try:
        text, _, notes = shown(encoder(source, row))
    except DataError as error:
        assert re.search(r"does not show the (text of turn|tool_calls of turn|row's tools)", str(error))
        assert "false" in source or "if m.role" in source or "''" in source or "in []" in source
        return
    if UNSHOWN_REASONING in notes:
        row["messages"] = [{key: turn[key] for key in turn if key != "reasoning"} for turn in row["messages"]]
    assert set(re.findall(r"w\d+w", json.dumps(row))) <= set(re.findall(r"w\d+w", text))


def test_keys_that_nothing_reads_are_noted_once_each(encoder):
    part = {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}
    turns = [{"role": "user", "content": [part, part], "name": "Ann", "at": 3}, {"role": "assistant", "content": "a"}]
    row = {"id": 1, "source": "x", "messages": turns}
    assert shown(encoder(WHOLE, row))[2] == (
        "the key 'name' of a turn, which nothing reads",
        "the key 'id', which nothing reads", "the key 'source', which nothing reads",
        "the key 'cache_control' of a part, which nothing reads", "the key 'at' of a turn, which nothing reads",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for call in m.tool_calls or []", "for call in (m.tool_calls or [])[:1]"),
        ("call.function.arguments | tojson", "call.function.arguments.x | tojson"),
    ],
)
def test_each_call_and_each_argument_must_be_shown(encoder, old, new):
    calls = [{"name": "add", "arguments": {"x": 1, "y": 2}}, {"name": "sub", "arguments": {"x": 1}}]
    row = {"messages": [ASKED, {**CALLS, "tool_calls": calls}]}
    assert 'sub {"x": 1}' in shown(encoder(WHOLE, row))[0]
    with pytest.raises(DataError, match="does not show the tool_calls of turn 1, .*all of them, with all"):
        encoder(WHOLE.replace(old, new), row)(0, 0)


def test_a_key_of_a_turn_counts_as_read_only_where_the_text_shows_it(encoder):
    row = {"messages": [{**ASKED, "name": "Ann"}, {"role": "assistant", "content": "a", "name": "Bo"}]}
    source = untagged(WHOLE)  # has the word, for calls
    assert shown(encoder(source, row))[2] == ("the key 'name' of a turn, which nothing reads",)
    named = source.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    text, _, notes = shown(encoder(named, row))
    assert "Ann: q" in text and notes == ()


def test_what_a_key_makes_the_template_leave_out_is_refused_after_rows_without_it(encoder):
    turns = [ASKED, {"role": "assistant", "content": "a"}]
    hiding = untagged(WHOLE).replace("{{ m.content }}", "{% if not m.hidden %}{{ m.content }}{% endif %}")
    encode = encoder(hiding, {"messages": turns}, {"messages": [{**ASKED, "hidden": True}, turns[1]]})
    assert isinstance(encode(0, 0), EncodedRow)
    with pytest.raises(DataError, match="does not show the text of turn 0, of the user"):
        encode(1, 0)


def test_each_tool_must_be_shown(encoder):
    row = {**ROW, "tools": [{"name": "add"}, {"name": "sub"}]}
    assert '"sub"' in shown(encoder(WHOLE, row))[0]
    with pytest.raises(DataError, match="does not show the row's tools, all of them"):
        encoder(WHOLE.replace("tools | tojson", "tools[:1] | tojson"), row)(0, 0)


def test_answers_that_a_template_does_not_tag_are_noted(encoder):
    last = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}<|eot_id|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    )
    row = {"messages": [ASKED, {"role": "assistant", "content": "a"}] * 2}
    _, learned, notes = shown(encoder(last, row))
    assert learned == ["a<|eot_id|>"] and notes == (UNTAGGED,)
    assert shown(encoder(last, row, answers="one"))[2] == ()
