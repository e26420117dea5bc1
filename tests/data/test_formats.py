"""Which rows are read, how, and that nothing of a row is lost in silence."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.config.data import DatasetConfig
from unmask.config.reader import read_section
from unmask.data.conversation import Conversation, Message, RowProblem, read_turns
from unmask.data.formats import Columns, check_row, is_plain, read_conversation
from unmask.data.keys import _KEYS_BY_REASON, FLAGS, SYSTEM, is_given
from unmask.data.sources import open_rows
from unmask.errors import ConfigError, DataError

REPORTS = Path(__file__).parents[1] / "fixtures" / "reports"
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "add", "arguments": {"x": 1}}
CALLED = {"tool_calls": [{"type": "function", "function": CALL}]}


def read(row: object, **columns: object) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in read_conversation(row, Columns(**columns)).messages]


def refusal(row: object, **columns: object) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        read_conversation(row, Columns(**columns))
    return caught.value


def rows(name: str, **fields: object) -> list[Conversation]:
    opened = open_rows(DatasetConfig(str(REPORTS / f"{name}.jsonl"), **fields))
    return [opened[index] for index in range(len(opened))]


FORMS = {
    "messages": {"messages": [Q, A]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "mixed_in_a_list": {"messages": [{"from": "human", "value": "q"}, A]},
    "mixed_in_a_turn": {"conversations": [{"from": "human", "content": "q"}, {"role": "gpt", "value": "a"}]},
    "said_twice_alike": {"messages": [{**Q, "from": "human", "value": "q"}, A]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion_lists": {"prompt": [Q], "completion": [A]},
    "prompt_list_and_text": {"prompt": [Q], "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "history": []},
    "query_response": {"query": "q", "response": "a", "history": None},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_format_gives_the_same_conversation(row):
    assert read(row) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("key", SYSTEM)
@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_a_rows_own_system_text_is_a_system_turn_in_every_format(row, key):
    assert read({**row, key: "s"})[0] == ("system", "s")
    assert read({**row, key: " "}) == read(row)


@pytest.mark.parametrize("row", [*FORMS.values(), {"q": "q", "a": "a"}], ids=[*FORMS, "columns"])
def test_tools_are_read_as_json_or_its_text_in_every_format(row):
    columns = {"prompt": "q", "completion": "a"} if "q" in row else {}
    tool = {"name": "add", "parameters": {"type": "object"}}
    wanted = ({"type": "function", "function": tool},)
    for written in ([tool], json.dumps([tool]), [{"type": "function", "function": tool}], [json.dumps(tool)]):
        assert read_conversation({**row, "tools": written}, Columns(**columns)).tools == wanted
    assert read_conversation({**row, "tools": "[]"}, Columns(**columns)).tools == ()
    for bad, problem in (
        ("[x", "tools is not JSON"),
        ("{}", "tools must be a list"),
        ([{"x": 1}], "tools[0] is no obj"),
    ):
        assert problem in str(refusal({**row, "tools": bad}, **columns))


def test_alpaca_rows_are_read_whole():
    row = {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    history = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert read(row) == [("system", "s"), *history, ("user", "i\nj"), ("assistant", "o")]
    assert read({"instruction": "", "input": "j", "output": "o"}) == [("user", "j"), ("assistant", "o")]
    assert "history[0] must be a pair" in str(refusal({**row, "history": [["q1"]]}))
    assert read(row, prompt="instruction", completion="output") == read(row)


def test_what_the_assistant_says_in_a_prompt_is_context():
    row = {"prompt": [Q, A, Q], "completion": [A]}
    supervised = [turn.supervised for turn in read_conversation(row).messages]
    assert supervised == [None, False, None, None]


def test_the_columns_that_are_named_leave_nothing_out():
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "q", "answer": "a"}
    assert read({**row, "system": "s"}, **columns) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    for key in ("input", "context", "history", "messages", "documents", "chosen", "label"):
        problem = refusal({**row, key: "x"}, **columns)
        assert str(problem).startswith(f"the row has {key!r}") and problem.key == key
    assert read_conversation({**row, "id": 3}, Columns(**columns)).unread == ("id",)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [Q, A], "conversations": [{"from": "gpt", "value": "b"}]}, "'conversations', which is a convers"),
        ({"messages": [Q, A], "prompt": "other"}, "'prompt', which is a conversation of another format"),
        ({"messages": [Q, A], "completion": "q"}, "'completion', which is a conversation of another format"),
        ({"messages": [Q, A], "text": "q"}, "'text', which is a conversation of another format"),
        ({"messages": [Q, A], "history": [["q", "a"]]}, "'history', and the text would lack it"),
        ({"prompt": "q", "completion": "a", "input": "x"}, "'input', which is a conversation of another format"),
        ({"messages": [{"role": "system", "content": "t"}, A], "system": "s"}, "'system' and a system turn, which d"),
        ({"messages": [Q, A], "system": "s", "system_prompt": "t"}, "'system' and 'system_prompt', which differ"),
        ({"messages": [{**Q, "from": "gpt"}, A]}, "messages[0] has 'role' and 'from', which differ"),
        ({"messages": [{**Q, "value": "r"}, A]}, "messages[0] has 'content' and 'value', which differ"),
    ],
)
def test_a_row_that_says_two_things_is_refused_by_name(row, said):
    assert said in str(refusal(row))


def test_turns_under_a_second_key_that_say_more_are_refused():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
    flagged = [*turns[:3], {**turns[3], "weight": 0}]
    assert read_conversation({"messages": turns, "conversations": turns}).unread == ()
    with pytest.raises(RowProblem, match="'conversations', which is a conversation of another format"):
        read_conversation({"messages": turns, "conversations": flagged})


def test_a_key_that_repeats_what_the_turns_say_is_no_contradiction():
    again = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    whole = {**again, "messages": [Q, A], "prompt": "q ", "completion": "a"}
    assert read_conversation(whole) == read_conversation({"messages": [Q, A]})
    row = {"instruction": "i", "input": "j", "output": "o", "text": "Below is an instruction. i Input: j Response: o"}
    assert "'text'" in str(refusal({**row, "text": "i o"})) and read({**row, "text": "i\nj: o"})
    system = {"messages": [{"role": "system", "content": "s"}, Q, A], "system": "s"}
    assert read(system) == [("system", "s"), ("user", "q"), ("assistant", "a")]


PUBLISHED = {  # in the manner of data sets that many people have
    "alpaca": {"instruction": "i", "input": "j", "output": "o", "text": "### Instruction:\ni\n\n### Input:\nj\n### o"},
    "alpaca_prompt": {"instruction": "i", "input": "", "output": "o", "prompt": "Below is an instruction.\ni\n### o"},
    "ultrachat": {"prompt": "q", "prompt_id": "1f", "messages": [Q, A, Q, A]},
    "slim_orca": {"conversations": [
        {"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "q", "weight": 0.0},
        {"from": "gpt", "value": "a", "weight": 1.0},
    ]},
    "magpie": {**FORMS["conversations"], "instruction": "q", "input": "q", "response": "a", "output": "a", "uuid": "1"},
    "hermes": {**FORMS["conversations"], "system_prompt": None, "custom_instruction": False, "skip": None, "idx": "3"},
    "tulu": {"id": "t", "messages": [Q, A], "source": "x"},
}  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_published_rows_are_read(row):
    conversation = read_conversation(row)
    assert conversation.messages[-1].role == "assistant"
    renderings = [key for key in ("text", "prompt") if "###" in str(row.get(key))]
    assert [key for key in conversation.unread if key in ("text", "prompt")] == renderings  # listed: it may say more


def test_a_key_nested_deeply_is_unread_as_others_are():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    row = {"messages": [Q, A], "id": deep}
    assert is_plain(row) and read_conversation(row).unread == ()


@pytest.mark.parametrize("key", sorted({key for keys in _KEYS_BY_REASON.values() for key in keys}))
def test_a_key_that_changes_what_a_row_teaches_is_refused_with_the_remedy(key, tmp_path):
    if key not in (*SYSTEM, "tools", "messages"):
        problem = refusal({"messages": [Q, A], key: "x"})
        assert f"the row has {key!r}, " in str(problem) and problem.key == key
        assert f"set dataset.ignore_keys: [{key}]" in problem.remedy("dataset")
        assert read({"messages": [Q, A], key: "x"}, ignore=[key]) == [("user", "q"), ("assistant", "a")]
        assert read_conversation({"messages": [Q, A], key: []}).unread == ()
    if key not in (*FLAGS, "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking"):
        assert f"messages[1] has {key!r}, " in str(refusal({"messages": [Q, {**A, key: "x"}]}))
    if key != "text":
        part = {"type": "text", "text": "a", key: "x"}
        assert f"messages[0].content[0] has {key!r}, " in str(refusal({"messages": [{**A, "content": [part]}]}))


def test_false_and_zero_say_something():
    for value in (False, 0):
        assert refusal({"messages": [Q, A], "label": value}).key == "label"
        assert read_conversation({"messages": [Q, A], "id": value}).unread == ("id",)


def test_keys_left_out_are_left_out_everywhere(tmp_path):
    part = {"type": "text", "text": "q", "documents": "x"}
    row = {"label": 1, "documents": "x", "messages": [{"role": "user", "content": [part]}, {**A, "weight": 0}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = DatasetConfig(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*; set dataset.ignore_keys: \[documents\] to leave"):
        open_rows(config)
    opened = open_rows(DatasetConfig(config.path_or_dataset_id, ignore_keys=["label", "documents", "weight"]))
    assert opened[0].messages == (Message("user", "q"), Message("assistant", "a"))
    for keys, problem in (([" "], "has an empty name"), (["p"], "has 'p', the column")):
        values = {"path_or_dataset_id": "x.jsonl", "prompt_column": "p", "completion_column": "c", "ignore_keys": keys}
        with pytest.raises(ConfigError, match=f"dataset.ignore_keys: {problem}"):
            read_section(DatasetConfig, values, "dataset")


@pytest.mark.parametrize("key, positive", FLAGS.items())
def test_a_turn_says_whether_it_is_learned(key, positive):
    for value in (0, 1, 0.0, 1.0, False, True):
        row = {"messages": [Q, {**A, key: value}, Q, A]}
        assert read_conversation(row).messages[1].supervised is (bool(value) is positive)
    assert read_conversation({"messages": [Q, {**A, key: None}]}).messages[1].supervised is None
    for value in (0.5, 2, -1, "1", [1]):
        assert f"messages[1].{key} is {value!r}" in str(refusal({"messages": [Q, {**A, key: value}]}))
    asked = {**Q, key: int(not positive)}
    assert read_conversation({"messages": [asked, A]}).messages[0].supervised is False
    assert "only the assistant's turns" in str(refusal({"messages": [{**Q, key: int(positive)}, A]}))
    left_out = {**A, key: int(not positive)}
    assert "nothing to learn" in str(refusal({"messages": [Q, left_out, Q, left_out]}))
    other = "train" if key != "train" else "masked"
    contrary = {**A, key: int(positive), other: int(other == "masked")}
    assert "which contradict each other" in str(refusal({"messages": [Q, contrary]}))


EMPTY = [
    "",
    " \n\t",
    "\u200b",
    "\u3164",
    "\u2800 \ufe0f",
    "\ufeff \u2060",
    [],
    [{"type": "text", "text": " "}],
    [{"type": "text", "text": ""}],
]


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_turn_is_no_answer_and_no_question(empty):
    assert "there is nothing to learn" in str(refusal({"messages": [Q, {**A, "content": empty}]}))
    assert "there is nothing to learn" in str(refusal({"messages": [Q, {**A, "content": empty}, Q, A]}))
    assert "nothing is asked" in str(refusal({"messages": [{**Q, "content": empty}, A]}))
    for question, answer in FORMS_OF_COLUMNS:
        if isinstance(empty, str):
            assert f"column {answer!r} is empty" in str(refusal({question: "q", answer: empty}))
            assert f"column {question!r} is empty" in str(refusal({question: empty, answer: "a"}))
        else:
            assert refusal({question: "q", answer: empty})


FORMS_OF_COLUMNS = [("prompt", "completion"), ("instruction", "output"), ("query", "response")]


def test_other_empty_turns_may_be():
    turns = [{"role": "system", "content": ""}, Q, {**A, **CALLED}, {"role": "tool", "content": ""}, A]
    assert read({"messages": turns})[0] == ("system", "")
    with pytest.raises(RowProblem, match="there is nothing to learn"):
        read_turns([Q, {**A, "content": ""}, Q], "messages", prompt=True)


@pytest.mark.parametrize(
    "turn",
    [
        {**A, **CALLED},
        {"role": "assistant", "content": None, **CALLED},
        {**A, "tool_calls": [CALL]},
        {**A, "tool_calls": json.dumps(CALLED["tool_calls"])},
        {**A, "tool_calls": [{"type": "function", "function": {**CALL, "arguments": '{"x": 1}'}}]},
        {**A, "function_call": {"name": "add", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
)
def test_calls_are_read_in_every_way_that_they_are_written(turn):
    message = read_turns([Q, turn], "messages")[1]
    assert message.role == "assistant" and dict(message.extra) == CALLED


def test_fields_that_a_table_adds_to_a_call_are_no_arguments(monkeypatch):
    import datasets

    calls = [{"name": "add", "arguments": {"x": 1}}, {"name": "say", "arguments": {"text": "b"}}]
    turns = [[Q, {**A, "tool_calls": [{"type": "function", "function": call}]}] for call in calls]
    table = datasets.Dataset.from_list([{"messages": each} for each in turns])
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "text": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table)
    rows = open_rows(DatasetConfig("someone/rows", split="train"))
    assert [rows[n].messages[1].extra["tool_calls"][0]["function"] for n in range(2)] == calls


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response"])
def test_results_of_tools_are_turns(role):
    assert read({"messages": [Q, A, {"role": role, "content": "5"}, A]})[2] == ("tool", "5")


@pytest.mark.parametrize(
    "turn, said",
    [
        ({**Q, **CALLED}, "messages[0] has 'tool_calls' and only the assistant calls a tool"),
        ({**A, **CALLED, "function_call": CALL}, "which are two ways to call a tool"),
        ({**A, "tool_calls": "x"}, ".tool_calls is not JSON"),
        ({**A, "function_call": '{"name": "a", "name": "b"}'}, "the key 'name' is given twice"),
        ({**A, "tool_calls": ["add"]}, "messages[0].tool_calls[0] is no call of a function with a name"),
        ({**A, "function_call": {"name": "add", "arguments": "x"}}, ".arguments is not JSON"),
        ({**A, "function_call": {"name": "add", "arguments": "[1]"}}, ".arguments must be an object"),
        ({**A, "function_call": {"name": "add", "parameters": {"x": 1}}}, "has 'parameters' beside"),
        ({"from": "function_call", "value": "add(1)"}, "messages[0].value is not JSON"),
        ({**A, "tool_calls": [{"type": "custom", "function": CALL}]}, ".type is 'custom'"),
    ],
)
def test_calls_that_cannot_be_read_are_refused_by_name(turn, said):
    assert said in str(refusal({"messages": [turn, A]}))


def test_annotations_of_parts_change_nothing():
    assert rows("cache_control")[0].messages == (
        Message("user", "2+2?", unread=("cache_control",)),
        Message("assistant", "4"),
    )
    part = {"type": "text", "text": "a", "annotations": [{"url": "x"}], "citations": None, "id": 0}
    assert read_turns([{**A, "content": [part]}], "m")[0] == Message("assistant", "a", unread=("annotations", "id"))


def test_reported_rows_are_read_whole():
    assert [turn.content for turn in rows("alpaca")[0].messages] == ["Reverse the word.\nabcd", "dcba"]
    french = rows("row_system")[0]
    assert french.messages[0] == Message("system", "Answer in French only.")
    assert french.tools == ({"type": "function", "function": {"name": "add"}},)
    assert [turn.supervised for turn in rows("turn_weight")[0].messages] == [None, False, None, True]
    assert rows("reasoning")[0].messages[1].reasoning == "Two and two."
    assert rows("toolcall_empty")[0].messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


@pytest.mark.parametrize("name, column", [("empty_answer", None), ("empty_columns", "question")])
def test_reported_rows_without_an_answer_are_refused_or_skipped(name, column):
    columns = {"prompt_column": column, "completion_column": "answer"} if column else {}
    with pytest.raises(DataError, match=rf"{name}.jsonl:1: .* is empty, so there is nothing to learn; fix the row"):
        rows(name, **columns)
    with pytest.raises(DataError, match="no rows, all 4 are malformed"):
        rows(name, **columns, on_malformed="skip")


def words_of(value: object) -> set[str]:
    """Return the texts anywhere in a value that the rows below made up."""
    return set(re.findall(r"w\d+w", json.dumps(value)))


class RandomRows:
    """Makes rows of every format with random further keys; each text in a row is a word of its own."""

    def __init__(self, seed: int) -> None:
        self.random, self.number = random.Random(seed), itertools.count()
        known = [key for keys in _KEYS_BY_REASON.values() for key in keys]
        self.keys = [*known, *("id", "source", "name", "lang", "url", "score")]

    def word(self) -> str:
        return f"w{next(self.number)}w"

    def value(self) -> object:
        make = [
            self.word, self.word, lambda: [self.word()], lambda: {"a": self.word()},
            lambda: [[self.word(), self.word()]], lambda: [{"name": self.word()}],
            lambda: json.dumps([{"name": self.word()}]), lambda: [{"role": "user", "content": self.word()}],
            lambda: {"name": self.word(), "arguments": {"x": self.word()}},
            *(lambda v=v: v for v in ("", " ", None, [], {}, [None], 0, 1, 0.5, True, False)),
        ]  # fmt: skip
        return self.random.choice(make)()

    def more(self, holder: dict, chance: float) -> dict:
        while self.random.random() < chance:
            holder.setdefault(self.random.choice(self.keys), self.value())
        return holder

    def turn(self, role: str) -> dict:
        text: object = self.word()
        if self.random.random() < 0.2:
            text = [self.more({"type": "text", "text": text}, 0.2)]
        spellings = {"user": ("user", "human"), "assistant": ("assistant", "gpt")}.get(role, (role,))
        names = [self.random.choice(pair) for pair in (("role", "from"), ("content", "value"))]
        return self.more(dict(zip(names, (self.random.choice(spellings), text), strict=True)), 0.15)

    def turns(self, *roles: str) -> list[dict]:
        return [self.turn(role) for role in roles]

    def row(self) -> dict:
        self.number = itertools.count()
        pairs = [("prompt", "completion"), ("instruction", "output"), ("query", "response"), ("q", "a")]
        one, other = self.random.choice(pairs)
        roles = self.random.choice([("user", "assistant"), ("system", "user", "assistant", "user", "assistant")])
        row = self.random.choice(
            [
                lambda: {self.random.choice(["messages", "conversations"]): self.turns(*roles)},
                lambda: {one: self.word(), other: self.word()},
                lambda: {"prompt": self.turns("user"), "completion": self.turns("assistant")},
            ]
        )()
        return self.more(row, 0.5)


def lost_words(row: dict, conversation: Conversation) -> set[str]:
    """Return the words of a row that are neither in its conversation nor under a key that it lists as unread."""
    read = [[turn.content, turn.reasoning, dict(turn.extra)] for turn in conversation.messages]
    lost = words_of({key: value for key, value in row.items() if key not in conversation.unread})
    lost -= words_of([read, conversation.tools])
    parts = {key for turn in conversation.messages for key in turn.unread}
    for turns in row.values():
        for turn in turns if isinstance(turns, list) else ():
            for part in (turn.get("content", turn.get("value")) if isinstance(turn, dict) else None) or ():
                lost -= words_of([part[key] for key in part if key in parts]) if isinstance(part, dict) else set()
    return lost


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_a_row_is_taken_whole_or_refused_by_name(seed):
    made = RandomRows(seed)
    for _ in range(100):
        row = made.row()
        columns = Columns("q", "a") if "q" in row else Columns()
        try:
            conversation = read_conversation(row, columns)
        except RowProblem as problem:
            assert any(re.search(rf"\b{key}\b", str(problem)) for key in row)
            continue
        assert not lost_words(row, conversation), row
        for key, value in row.items():
            if is_given(value) and not words_of(value):
                assert key in conversation.unread
        flags = [(turn, key) for turns in row.values() if isinstance(turns, list) for turn in turns
                 if isinstance(turn, dict) for key in FLAGS if turn.get(key) is not None]  # fmt: skip
        said = [turn.supervised for turn in conversation.messages if turn.supervised is not None]
        assert len({id(turn) for turn, _ in flags}) == len(said)


TEXTS = [
    "a",
    "#",
    "é",
    "",
    " ",
    " a",
    "\u200b",
    "a\u200b",
    "\ud800",
    "a\ud800",
    None,
    1,
    b"a",
    [],
    [{"type": "text", "text": "a"}],
]
SPEAKERS = ["user", "assistant", "human", "gpt", "system", "tool", "bot", None, 1, [], {}]


@settings(max_examples=150)
@given(data=st.data())
def test_a_row_that_is_known_at_a_glance_is_one_that_is_read(data):
    names = data.draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "value")]))
    texts, speakers = st.sampled_from(TEXTS), st.sampled_from(SPEAKERS)
    turns = data.draw(st.lists(st.tuples(speakers, texts), max_size=2))
    turns += data.draw(st.sampled_from([[], [("assistant", "a")], [("gpt", "a")]]))
    row = {
        data.draw(st.sampled_from(["messages", "conversations"])): [
            dict(zip(names, said, strict=True)) for said in turns
        ]
    }
    row.update(data.draw(st.dictionaries(st.sampled_from(["id", "system", "prompt", "tools", "q", "a"]), texts)))
    for columns in (Columns(), Columns("q", "a"), Columns("prompt", "a"), Columns(ignore=["system"])):
        try:
            conversation = read_conversation(row, columns)
        except RowProblem as problem:
            with pytest.raises(RowProblem, match=re.escape(str(problem))):
                check_row(row, columns)
            continue
        check_row(row, columns)
        if is_plain(row, columns):
            assert conversation.tools == ()
            assert all(turn == Message(turn.role, turn.content) for turn in conversation.messages)


def test_most_rows_are_known_at_a_glance():
    for name in ("messages", "conversations"):
        assert is_plain({**FORMS[name], "id": 1})
    assert is_plain({"question": "q", "answer": "a é", "id": 1}, Columns("question", "answer"))


@pytest.mark.parametrize(
    "turns", [[{"role": "tool", "content": "5"}, A], [Q, {"from": "observation", "value": "5"}, A]]
)
def test_what_a_tool_returned_stands_behind_a_turn_that_may_call_it(turns: list) -> None:
    with pytest.raises(
        RowProblem, match=r"messages\[[01]\] is what a tool returned, and no assistant's turn before it"
    ):
        read({"messages": turns})
