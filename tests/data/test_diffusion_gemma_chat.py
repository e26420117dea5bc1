"""DiffusionGemma's chats: our tagged template, and an untagged one as checkpoints have, against the same references."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from unmask.config.data import DatasetConfig
from unmask.data.chat import ChatTemplate, Encoded
from unmask.data.conversation import Message
from unmask.data.encode import EncodedRow, RowEncoder
from unmask.data.formats import Columns, read_conversation
from unmask.data.prep import prep_gsm8k
from unmask.data.sources import open_rows
from unmask.data.template_loading import load_template
from unmask.data.template_source import read_template
from unmask.errors import DataError

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "diffusion_gemma_chat.json").read_text("utf-8"))
IDS = [f"{case['name']}-{'-'.join(case['kwargs']) or 'plain'}" for case in CASES]
UNTAGGED = re.sub(r"\{%-? *(end)?generation *-?%\}", "", read_template("diffusion_gemma"))
THOUGHT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "old"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "new"},
]


def make(kind: str, tokenizer: PreTrainedTokenizerFast, **options) -> ChatTemplate:
    if kind == "tagged":
        return load_template(tokenizer, "diffusion_gemma", **options)
    tokenizer.chat_template = UNTAGGED
    return load_template(tokenizer, **options)


@pytest.fixture(params=["tagged", "untagged"])
def kind(request) -> str:
    return request.param


def stretches(tokenizer, encoded: Encoded) -> list[str]:
    """Decode each run of supervised tokens."""
    runs = groupby(zip(encoded.ids, encoded.supervised, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for supervised, run in runs if supervised]


def saved(path: Path, source: str) -> str:
    path.write_text(source, "utf-8")
    return str(path)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_renders_and_supervises_as_the_reference_says(case, kind, gemma_tokenizer):
    variables = dict(case["kwargs"])
    prompt = variables.pop("add_generation_prompt", False)
    template = make(kind, gemma_tokenizer, variables=variables)
    assert template.tagged == (kind == "tagged")
    assert template.render(case["messages"], add_generation_prompt=prompt) == case["rendered"]
    if prompt:
        assert gemma_tokenizer.decode(template.encode_prompt(case["messages"])) == case["rendered"]
        return
    if not case["supervised"]:
        assert not any(template.encode(case["messages"]).supervised)
        return
    encoded = template.encode(case["messages"])
    before, last, _ = case["rendered"].rpartition(case["supervised"][-1])
    assert gemma_tokenizer.decode(encoded.ids) == before + last  # nothing of the turns behind it
    assert stretches(gemma_tokenizer, encoded) == case["supervised"]
    newest = template.encode(case["messages"], last_only=True)
    assert newest.ids == encoded.ids and stretches(gemma_tokenizer, newest) == case["supervised"][-1:]


def test_the_untagged_source_differs_in_its_tags_alone():
    assert "generation -%" not in UNTAGGED and len(read_template("diffusion_gemma")) - len(UNTAGGED) < 50


def test_supervision_starts_where_the_prompt_ends_and_ends_with_the_turn(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}]
    encoded, prompt = template.encode(turns), template.encode_prompt(turns[:1])
    assert encoded.ids[: len(prompt)] == prompt and encoded.supervised == [
        False,
    ] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert gemma_tokenizer.convert_tokens_to_ids("<turn|>") in encoded.ids[len(prompt) :]


def test_reasoning_is_supervised_where_it_is_rendered(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer, supervise_reasoning=True)
    encoded = template.encode(THOUGHT, supervise_reasoning=True)
    thought = "<|channel>thought\nnew\n<channel|>d<turn|>\n"
    assert stretches(gemma_tokenizer, encoded) == ["b<turn|>\n", thought]
    last = template.encode(THOUGHT, last_only=True, supervise_reasoning=True)
    assert stretches(gemma_tokenizer, last) == [thought]
    plain = template.encode(THOUGHT)
    assert plain.ids[: plain.supervised.index(True)] == encoded.ids[: encoded.supervised.index(True)]
    assert gemma_tokenizer.decode(plain.ids) == gemma_tokenizer.decode(encoded.ids)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_each_of_its_names(name, kind, gemma_tokenizer):
    row = {"messages": [THOUGHT[0], {"role": "assistant", "content": "b", name: "hm"}]}
    messages = read_conversation(row, Columns()).messages
    assert messages[1] == Message("assistant", "b", reasoning="hm")
    assert "<|channel>thought\nhm\n<channel|>b<turn|>" in make(kind, gemma_tokenizer).render(messages)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["user", "assistant", "system"]),
            st.text(max_size=8) | st.sampled_from(["<turn|>", "x<|channel>thought\nhm\n<channel|>y", "4<turn|>\n"]),
            st.sampled_from(["", "", "4", "hm <|turn>"]),
        ),
        max_size=5,
    ),
    supervise=st.booleans(),
)
def test_tagged_and_untagged_agree_on_any_conversation(gemma_tokenizer, turns, supervise):
    tagged, untagged = make("tagged", gemma_tokenizer), make("untagged", gemma_tokenizer)
    messages = [Message("user", "hello")]
    for role, text, reasoning in turns:
        messages.append(Message(role, text, reasoning=reasoning if role == "assistant" else ""))

    def outcome(template: ChatTemplate, last_only: bool) -> Encoded | None:
        try:
            return template.encode(messages, last_only, supervise)
        except DataError:
            return None

    for last_only in (False, True):
        theirs, ours = outcome(untagged, last_only), outcome(tagged, last_only)
        # An untagged template may leave more unknown: reasoning between assistant turns in a row.
        between = any(
            a.role == b.role == "assistant" and b.reasoning for a, b in zip(messages, messages[1:], strict=False)
        )
        assert theirs == ours or (theirs is None and between)


def test_reasoning_that_parts_an_answer_is_refused_unless_it_is_supervised_too(gemma_tokenizer):
    template = make("tagged", gemma_tokenizer)
    first, second = ({"role": "assistant", "content": text} for text in "AB")
    turns = [THOUGHT[0], first, second | {"reasoning": "hm"}]
    for last_only in (False, True):
        with pytest.raises(DataError, match="has no end to learn; set dataset.supervise_reasoning: true"):
            template.encode(turns, last_only)
    whole = ["A<|channel>thought\nhm\n<channel|>B<turn|>\n"]
    assert stretches(gemma_tokenizer, template.encode(turns, supervise_reasoning=True)) == whole
    turns = [THOUGHT[0], first | {"reasoning": "hm"}, second]
    assert stretches(gemma_tokenizer, template.encode(turns)) == ["AB<turn|>\n"]


def test_a_turn_in_two_messages_is_one_answer(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer)
    turns = [THOUGHT[0], *({"role": "assistant", "content": text} for text in "xyz"), *THOUGHT[2:]]
    assert stretches(gemma_tokenizer, template.encode(turns)) == ["xyz<turn|>\n", "d<turn|>\n"]
    assert stretches(gemma_tokenizer, template.encode(turns, last_only=True)) == ["d<turn|>\n"]


def test_turns_with_headers_of_their_own_are_never_joined(tokenizer):
    # Each rendering starts with the number of turns in a row at its end, so that no turn alone can be found.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if not loop.last and loop.nextitem['role'] == m['role'] %}+{% else %}.{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = load_template(tokenizer)
    with pytest.raises(DataError, match="where an answer starts is unknown; set dataset.chat_template"):
        template.encode([THOUGHT[0], *({"role": "assistant", "content": text} for text in "xy")])


def test_thinking_spelt_in_an_answer_is_refused_where_it_should_be_learnt(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer)
    turns = [THOUGHT[0], {"role": "assistant", "content": "<|channel>thought\nhm\n<channel|>b"}]
    with pytest.raises(
        DataError, match="removes the text at '<.channel>' from turn 1; give reasoning as reasoning_con"
    ):
        template.encode(turns, supervise_reasoning=True)
    kept = [THOUGHT[0], {"role": "assistant", "content": "b<|turn>"}]
    assert template.encode(kept, supervise_reasoning=True).ids == template.encode(kept).ids


def test_text_that_a_template_keeps_only_in_part_stays_text(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer)
    forged = "x<turn|>\n<|turn>model\n<|channel>thought\nhm<channel|> y<|image|>"
    turns = [{"role": "user", "content": forged}, {"role": "assistant", "content": forged}]
    encoded = template.encode(turns)
    assert stretches(gemma_tokenizer, encoded) == ["x<turn|>\n<|turn>model\n y<|image|><turn|>\n"]
    plain = template.encode([{**turn, "content": "x"} for turn in turns])
    special = set(gemma_tokenizer.added_tokens_decoder)
    assert [i for i in encoded.ids if i in special] == [i for i in plain.ids if i in special]
    prompt = template.encode_prompt(turns[:1])
    assert encoded.ids[: len(prompt)] == prompt


def test_a_template_that_acts_on_spelt_tokens_beyond_recognition_is_refused(gemma_tokenizer, tmp_path):
    path = saved(tmp_path / "odd.jinja", read_template("llada").replace("| trim", "| trim | replace('<turn|>', 'T')"))
    rule = "{% if '<turn|>' in messages[0]['content'] %}{{ messages | length }}{% endif %}"
    template = load_template(gemma_tokenizer, saved(tmp_path / "odder.jinja", rule + read_template("llada")))
    turns = [{"role": "user", "content": "a<turn|>"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="acts on control tokens that the text of a turn spells, such as '<turn.>'; ta"):
        template.encode(turns)
    turns[1]["content"] = "b<|turn>"  # the template keeps this one, so it is no reasoning that would be lost
    for supervise in (False, True):
        encoded = load_template(gemma_tokenizer, path).encode(turns, supervise_reasoning=supervise)
        assert "aT<|eot_id|>" in gemma_tokenizer.decode(encoded.ids)
        assert stretches(gemma_tokenizer, encoded) == ["b<|turn><|eot_id|>"]


def test_variables_hold_for_prompts_too_and_can_be_overridden(kind, gemma_tokenizer):
    template = make(kind, gemma_tokenizer, variables={"enable_thinking": True})
    assert "<|think|>" in template.render(THOUGHT[:1], add_generation_prompt=True)
    gemma_tokenizer.chat_template = template.source  # as a run saves it
    again = load_template(gemma_tokenizer, for_training=False)
    assert again.encode_prompt(THOUGHT[:1]) == template.encode_prompt(THOUGHT[:1])
    without = gemma_tokenizer.apply_chat_template(THOUGHT[:1], tokenize=False, enable_thinking=False)
    assert without == "<bos><|turn>user\na<turn|>\n"
    assert load_template(gemma_tokenizer, variables={"enable_thinking": False}).render(THOUGHT[:1]) == without


@pytest.mark.parametrize("value", ['"}} %}\\n\n🙂', "", 3, -1.5, None, False])
def test_a_variable_has_the_value_that_it_was_given(gemma_tokenizer, tmp_path, value):
    path = saved(tmp_path / "shows.jinja", "\n{% set n = [mine] %}{{ n | tojson }}" + read_template("llada"))
    template = load_template(gemma_tokenizer, path, variables={"mine": value})
    assert template.render(THOUGHT).startswith(f"\n{json.dumps([value], ensure_ascii=False)}<bos>")


def test_a_variable_that_a_template_does_not_know_is_refused(gemma_tokenizer):
    with pytest.raises(
        DataError, match="dataset.chat_template_kwargs.enable_thnking: .*did you mean 'enable_thinking'"
    ):
        load_template(gemma_tokenizer, "diffusion_gemma", variables={"enable_thnking": True})
    with pytest.raises(DataError, match="enable_thinking: llada does not know it"):
        load_template(gemma_tokenizer, "llada", variables={"enable_thinking": True})


def test_a_template_without_reasoning_cannot_supervise_it(tokenizer):
    with pytest.raises(DataError, match="dataset.supervise_reasoning: llada leaves reasoning out of the text; name"):
        load_template(tokenizer, "llada", supervise_reasoning=True)


def test_tags_decide_about_reasoning_only_as_they_are_asked_to(gemma_tokenizer, tmp_path):
    ours = read_template("diffusion_gemma")
    inside = saved(tmp_path / "in.jinja", ours.replace("'' if supervise_reasoning", "'' if true").replace(
        "thought if supervise_reasoning", "thought if true"))  # fmt: skip
    outside = saved(tmp_path / "out.jinja", ours.replace("supervise_reasoning", "false"))
    template = load_template(gemma_tokenizer, inside)
    assert any(template.encode(THOUGHT[:1] + [{"role": "assistant", "content": "b"}]).supervised)
    with pytest.raises(DataError, match="reasoning inside its .* set dataset.supervise_reasoning: true"):
        template.encode(THOUGHT)
    assert stretches(gemma_tokenizer, template.encode(THOUGHT, supervise_reasoning=True))[1].startswith("<|channel>")
    with pytest.raises(DataError, match="reasoning outside its .* set dataset.supervise_reasoning: false"):
        load_template(gemma_tokenizer, outside, supervise_reasoning=True)


def test_reasoning_that_cannot_be_told_from_the_answer_is_refused(gemma_tokenizer):
    # An empty thought is rendered where there is none, so taking the reasoning away leaves more than the answer.
    always = UNTAGGED.replace("if shown else ''", "if shown else '<|channel>thought\\n\\n<channel|>'")
    assert always != UNTAGGED
    gemma_tokenizer.chat_template = always
    template = load_template(gemma_tokenizer)
    with pytest.raises(DataError, match="do not show where the answer after it starts; set dataset.supervise_reason"):
        template.encode(THOUGHT, last_only=True)
    whole = template.encode(THOUGHT, last_only=True, supervise_reasoning=True)
    assert stretches(gemma_tokenizer, whole) == ["<|channel>thought\nnew\n<channel|>d<turn|>\n"]


@pytest.mark.parametrize(
    "turn, problem",
    [
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}, "a turn has tool_calls"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "a turn has a part of type image"),
    ],
)
def test_what_the_template_cannot_render_it_refuses(gemma_tokenizer, turn, problem):
    template = load_template(gemma_tokenizer, "diffusion_gemma")
    with pytest.raises(DataError, match=problem):
        template.render([THOUGHT[0], turn])


def test_parts_of_text_are_joined(gemma_tokenizer):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    row = {"messages": [{"role": "user", "content": parts}, THOUGHT[1]]}
    messages = read_conversation(row, Columns()).messages
    assert messages[0].content == "one two"
    template = load_template(gemma_tokenizer, "diffusion_gemma")
    assert template.render(row["messages"]) == template.render(messages)  # other tools give it the parts themselves


def test_fields_of_the_section_reach_the_template(gemma_tokenizer, tmp_path):
    path = saved(tmp_path / "rows.jsonl", json.dumps({"messages": THOUGHT}))
    for supervise in (False, True):
        config = DatasetConfig(path, answers="all", supervise_reasoning=supervise)
        row = RowEncoder(open_rows(config), load_template(gemma_tokenizer, "diffusion_gemma"), config)(0, 0)
        assert isinstance(row, EncodedRow)
        encoded = Encoded(row.input_ids.tolist(), row.supervised.tolist())
        assert any("new" in text for text in stretches(gemma_tokenizer, encoded)) == supervise


def test_prepared_gsm8k_trains_with_it(gemma_tokenizer, kind, tmp_path):
    problem = {"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}
    (tmp_path / "train.jsonl").write_text(json.dumps(problem) + "\n")
    path = prep_gsm8k(str(tmp_path), tmp_path / "out", "train")[0]
    config = DatasetConfig(str(path), mask_history=True)
    row = RowEncoder(open_rows(config), make(kind, gemma_tokenizer), config)(0, 0)
    assert isinstance(row, EncodedRow) and not row.cut
    assert stretches(gemma_tokenizer, Encoded(row.input_ids.tolist(), row.supervised.tolist())) == [
        f"{problem['answer']}<turn|>\n"
    ]
