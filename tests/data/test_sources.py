from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.config.data import DatasetConfig
from unmask.config.reader import read_section
from unmask.data.conversation import Message
from unmask.data.sources import open_rows
from unmask.errors import ConfigError, DataError


def chat(answer: str, question: str = "q") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *lines: object) -> str:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return str(path)


def answers(rows) -> list[str]:
    return [rows[i].messages[-1].content for i in range(len(rows))]


def said(content: object, **extra: object) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, **extra}]}


GOOD = chat("fine")
MALFORMED = {
    "not_json": (b'{"messages": [', "not JSON"),
    "more_than_json": (b'{"messages": []} x', "not JSON (Extra data"),
    "not_utf8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8 (byte 0xff"),
    "not_an_object": ([1], "a row must be an object, got a list"),
    "no_messages": (
        {"text": "x"},
        "no messages: among its keys ('text') are none of messages | conversations | prompt, completion",
    ),
    "messages_no_list": ({"messages": "x"}, "'messages' must be a list, got text"),
    "empty_messages": ({"messages": []}, "'messages' is empty"),
    "turn_no_object": ({"messages": ["x"]}, "messages[0] must be an object, got text"),
    "unknown_role": (
        {"messages": [GOOD["messages"][0], {"role": "Assistant", "content": "x"}]},
        "messages[1].role is 'Assistant', known are system, developer, user, human, assistant, gpt, tool",
    ),
    "no_role": ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    "role_no_text": ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role is [], known are"),
    "content_missing": ({"messages": [{"role": "user"}]}, "messages[0].content must be text, got null"),
    "an_image": (
        said([{"type": "text", "text": "x"}, {"type": "image", "url": "x.png"}]),
        "messages[1].content[1] is of type 'image', and training takes text alone",
    ),
    "an_image_beside_text": (
        said([{"type": "text", "text": "x", "image": "x.png"}]),
        "messages[1].content[0] has 'image', and training takes text alone",
    ),
    "a_part_without_type": (said([{"text": "x"}]), "messages[1].content[0] is of type missing"),
    "a_part_no_object": (said(["x"]), "messages[1].content[0] must be an object with a type, got text"),
    "a_part_without_text": (said([{"type": "text"}]), "messages[1].content[0].text must be text, got null"),
    "images_of_the_row": ({**GOOD, "images": ["x.png"]}, "the row has 'images', and training takes text alone"),
    "an_image_of_a_speaker": (
        {"image": "x.png", "conversations": [{"from": "gpt", "value": "x"}]},
        "the row has 'image', and training takes text alone",
    ),
    "images_of_a_turn": (said("x", images=["x"]), "messages[1] has 'images', and training takes text alone"),
    "reasoning_no_text": (said("x", reasoning_content=["r"]), "messages[1].reasoning_content must be text, got a list"),
    "reasoning_of_the_user": (
        {"messages": [{"role": "user", "content": "x", "reasoning": "r"}, *GOOD["messages"]]},
        "messages[0].reasoning is given, and only the assistant's turns have reasoning",
    ),
    "two_reasonings": (
        said("x", reasoning_content="r", reasoning="s"),
        "messages[1].reasoning differs from its reasoning_content, and both mean the same",
    ),
    "half_a_surrogate": (
        b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
        "messages[0].content holds half a surrogate pair",
    ),
    "no_assistant": ({"messages": [{"role": "user", "content": "x"}]}, "has no assistant turn"),
    "unknown_speaker": (
        {"conversations": [{"from": "bot", "value": "x"}]},
        "conversations[0].from is 'bot', known are system, developer, user, human, assistant, gpt",
    ),
}


@pytest.mark.parametrize("row, problem", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, problem):
    path = write(tmp_path / "rows.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataError) as error:
        open_rows(DatasetConfig(path))
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and problem in message
    assert "fix the row or set dataset.on_malformed: skip" in message
    assert "\n" not in message


@pytest.mark.parametrize("row, problem", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_skipped_and_kept_count_of(tmp_path, row, problem):
    path = write(tmp_path / "rows.jsonl", GOOD, row, chat("last"))
    rows = open_rows(DatasetConfig(path, on_malformed="skip"))
    assert answers(rows) == ["fine", "last"]
    assert len(rows.skipped) == 1 and rows.skipped[0].startswith(f"{path}:2: ") and problem in rows.skipped[0]
    assert rows.describe(1) == f"{path}:3"


def test_a_file_cut_short_is_named_by_its_last_line(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl", GOOD, GOOD))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON .* the file ends inside this row"):
        open_rows(DatasetConfig(str(path)))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no rows, the file is empty"):
        open_rows(DatasetConfig(str(tmp_path / "rows.jsonl")))


def test_a_file_of_malformed_rows_only_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"a": 1})
    with pytest.raises(DataError, match="no rows, all 1 are malformed"):
        open_rows(DatasetConfig(path, on_malformed="skip"))


def test_each_form_of_row_gives_the_same_conversation(tmp_path):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    path = write(tmp_path / "a.jsonl", {"conversations": turns})
    roles = [(m.role, m.content) for m in open_rows(DatasetConfig(path))[0].messages]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a")]
    path = write(tmp_path / "b.jsonl", {"in": "q", "out": "a"})
    config = DatasetConfig(path, prompt_column="in", completion_column="out")
    assert open_rows(config)[0].messages == (Message("user", "q"), Message("assistant", "a"))
    path = write(tmp_path / "c.jsonl", {"in": "q"})
    config = DatasetConfig(path, prompt_column="in", completion_column="out")
    with pytest.raises(DataError, match="c.jsonl:1: no column 'out', the row has 'in'"):
        open_rows(config)


def test_further_keys_of_a_turn_are_kept_for_the_template(tmp_path):
    turns = [{"role": "assistant", "content": "a", "name": "r", "tool_calls": None, "images": []}]
    rows = open_rows(DatasetConfig(write(tmp_path / "a.jsonl", {"messages": turns, "image": None})))
    assert rows[0].messages[0].as_dict() == {"role": "assistant", "content": "a", "name": "r"}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_kept_under_every_name_that_a_template_may_look_for(tmp_path, name):
    rows = open_rows(DatasetConfig(write(tmp_path / "a.jsonl", said("a", **{name: "r"}))))
    kept = {"reasoning": "r", "reasoning_content": "r", "thinking": "r"}
    assert rows[0].messages[1].as_dict() == {"role": "assistant", "content": "a", **kept}


def test_an_image_in_a_table_is_refused_by_row(monkeypatch):
    import datasets

    parts = [[{"type": "text", "text": "a", "url": None}], [{"type": "image", "text": None, "url": "x.png"}]]
    table = datasets.Dataset.from_list([{"messages": [{"role": "assistant", "content": content}]} for content in parts])
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table)
    rows = open_rows(DatasetConfig("someone/rows", split="train"))
    assert rows[0].messages == (Message("assistant", "a"),)
    with pytest.raises(
        DataError, match=r"someone/rows row 1: messages\[0\].content\[0\] is of type 'image'.*fix the row"
    ):
        rows[1]


def test_a_json_lines_file_is_read_by_offsets(tmp_path):
    rows_in = [chat("Grüße — 你好 🙂"), chat("b", "line\nbreak"), chat("c")]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows_in]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  " + lines[1] + b"\n" + lines[2])
    rows = open_rows(DatasetConfig(str(path)))
    assert answers(rows) == ["Grüße — 你好 🙂", "b", "c"]
    assert rows[1].messages[0].content == "line\nbreak"
    assert [rows.describe(i).rsplit(":")[-1] for i in range(3)] == ["1", "3", "4"]
    assert rows.text_length(2) == len(lines[2])
    assert answers(pickle.loads(pickle.dumps(rows))) == answers(rows)


@pytest.mark.parametrize("form", ["list", "object", "row_a_line", "pretty", "one_line", "single_row", "lines"])
def test_json_in_every_usual_shape(tmp_path, form):
    rows_in = [chat("ä"), chat("b")]
    text = {
        "list": json.dumps(rows_in, ensure_ascii=False),
        "object": json.dumps({"version": "é", "rows": rows_in}, indent=1, ensure_ascii=False),
        "row_a_line": '{"version": 1, "rows": [\n' + ",\n".join(map(json.dumps, rows_in)) + "\n]}",
        "pretty": json.dumps(rows_in, indent=2),
        "one_line": json.dumps({"data": rows_in}),
        "single_row": json.dumps(rows_in[0]),
        "lines": "".join(json.dumps(row) + "\n" for row in rows_in),
    }[form]
    path = tmp_path / "rows.json"
    path.write_text(text, "utf-8")
    rows = open_rows(DatasetConfig(str(path)))
    assert answers(rows) == (["ä"] if form == "single_row" else ["ä", "b"])


def test_json_lines_whose_first_is_malformed_are_lines(tmp_path):
    path = write(tmp_path / "rows.json", b'{"messages": [', chat("a"), chat("b"))
    assert answers(open_rows(DatasetConfig(path, on_malformed="skip"))) == ["a", "b"]


def test_a_malformed_row_in_a_json_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([chat("ä"), {"x": 1}], indent=1, ensure_ascii=False), "utf-8")
    line = path.read_text("utf-8").splitlines().index(' {\n  "x"'.split("\n")[0], 2) + 1
    with pytest.raises(DataError, match=f"rows.json:{line}: no messages"):
        open_rows(DatasetConfig(str(path)))


@pytest.mark.parametrize(
    "text, problem",
    [
        ('[{"messages": []},\n {"mess', "rows.json:2: not JSON .* cut short"),
        ('{"a": [1], "b": [2]}', "an object with 2 lists"),
        ('{"a": 1}', "an object with 0 lists"),
        ("3", "not a list of rows"),
        ("", "rows.json:1: not JSON"),
        ("[]", "no rows, the file is empty"),
    ],
)
def test_json_that_holds_no_rows_is_refused(tmp_path, text, problem):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=problem):
        open_rows(DatasetConfig(str(tmp_path / "rows.json")))


def test_max_samples_reads_no_further(tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("a"), chat("b"), b"torn")
    assert answers(open_rows(DatasetConfig(path, max_samples=2))) == ["a", "b"]


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    (tmp_path / "moved").mkdir()
    one = open_rows(DatasetConfig(write(tmp_path / "rows.jsonl", chat("a"), chat("b"))))
    two = open_rows(DatasetConfig(write(tmp_path / "moved" / "rows.jsonl", chat("a"), chat("b"))))
    three = open_rows(DatasetConfig(write(tmp_path / "rows.jsonl", chat("a"), chat("c"))))
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_the_fingerprint_follows_every_row(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [chat("a" * 200) for _ in range(2000)]
    changed = [*rows[:700], chat("b" * 200), *rows[701:]]  # as long, and far from both ends
    found = []
    for number, content in enumerate((rows, rows, changed)):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = open_rows(DatasetConfig(write(folder / "rows.jsonl", *content)))
        datasets.Dataset.from_list(content).save_to_disk(str(folder / "saved"))
        found.append([file.fingerprint, open_rows(DatasetConfig(str(folder / "saved"))).fingerprint])
        assert open_rows(DatasetConfig(str(folder / "rows.jsonl"), max_samples=700)).fingerprint not in found[-1]
        found[-1].append(open_rows(DatasetConfig(str(folder / "rows.jsonl"), max_samples=700)).fingerprint)
    assert found[0] == found[1]
    assert [one == other for one, other in zip(found[0], found[2], strict=True)] == [False, False, True]


def test_a_file_changed_under_way_is_noticed(tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("a"), chat("b"))
    rows = open_rows(DatasetConfig(path))
    write(tmp_path / "rows.jsonl", chat("something longer"))
    with pytest.raises(DataError, match="rows.jsonl:2: the file has changed"):
        rows[1]


@pytest.mark.parametrize(
    "path", ["trian.jsonl", "./train.txt", "a/b/train", "~/no/such.json", "data/train.parquet", "here/train"]
)
def test_a_missing_path_is_never_sent_to_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", GOOD)
    (tmp_path / "here").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    with pytest.raises(DataError, match="dataset.path_or_dataset_id: no such file") as error:
        open_rows(DatasetConfig(path))
    assert str(Path(path).expanduser().absolute()) in str(error.value)
    if path == "trian.jsonl":
        assert "did you mean 'train.jsonl'?" in str(error.value)


def test_a_name_that_is_neither_path_nor_hub_id_is_refused():
    with pytest.raises(DataError, match="neither an existing file or folder nor a hub id"):
        open_rows(DatasetConfig("gsm8k"))


def test_an_unreachable_hub_id_is_said_in_one_line(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'someone/rows' on the Hub.\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="'someone/rows' is no local path and cannot be loaded from the hub") as error:
        open_rows(DatasetConfig("someone/rows"))
    assert "\n" not in str(error.value) and "HF_HUB_OFFLINE" in str(error.value)


def test_a_hub_dataset_is_read_and_its_rows_are_named(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([chat("a"), {"messages": [{"role": "bot", "content": "x"}]}])
    asked = []

    def load(dataset_id, name, split):
        asked.append((dataset_id, name, split))
        return table if split else datasets.DatasetDict(train=table, test=table)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = open_rows(DatasetConfig("someone/rows", name="main", split="train[:2]"))
    assert asked == [("someone/rows", "main", "train[:2]")]
    assert rows[0].messages == (Message("user", "q"), Message("assistant", "a"))
    assert rows.text_length(0) == 2 and rows.text_length(1) == 0
    with pytest.raises(DataError, match="someone/rows row 1: .*'bot', known are"):
        rows[1]
    with pytest.raises(DataError, match="dataset.split: someone/rows has the splits train, test"):
        open_rows(DatasetConfig("someone/rows"))


def test_tables_on_disk(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list([chat("a"), chat("b"), chat("c")])
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "splits"))
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.data.table, tmp_path / "rows.parquet")
    assert answers(open_rows(DatasetConfig(str(tmp_path / "saved")))) == ["a", "b", "c"]
    assert answers(open_rows(DatasetConfig(str(tmp_path / "splits"), split="test"))) == ["a"]
    assert answers(open_rows(DatasetConfig(str(tmp_path / "rows.parquet"), max_samples=2))) == ["a", "b"]
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert answers(open_rows(DatasetConfig(str(arrow)))) == ["a", "b", "c"]
    with pytest.raises(DataError, match="'tset' is none of them .did you mean 'test'"):
        open_rows(DatasetConfig(str(tmp_path / "splits"), split="tset"))
    with pytest.raises(DataError, match="no column 'in' and 'out' among messages"):
        open_rows(DatasetConfig(str(arrow), prompt_column="in", completion_column="out"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_torn_table_is_refused(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=f"{name}: cannot be read as"):
        open_rows(DatasetConfig(str(tmp_path / name)))


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "train-1.jsonl", chat("a"), chat("b"))
    write(tmp_path / "train-2.jsonl", chat("c"))
    config = DatasetConfig(str(tmp_path))
    rows = open_rows(config)
    assert answers(rows) == ["a", "b", "c"]
    assert rows.describe(2).endswith("train-2.jsonl:1") and rows.text_length(2) == rows.text_length(0)
    assert answers(open_rows(DatasetConfig(str(tmp_path), max_samples=2))) == ["a", "b"]
    write(tmp_path / "test.jsonl", chat("d"))
    with pytest.raises(DataError, match=r"belong to several splits \(test, train\); set dataset.split"):
        open_rows(config)
    assert answers(open_rows(DatasetConfig(str(tmp_path), split="test"))) == ["d"]
    with pytest.raises(DataError, match="has test, train, not 'trian' .did you mean 'train'"):
        open_rows(DatasetConfig(str(tmp_path), split="trian"))


def test_fields_that_would_be_ignored_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match="dataset.split: .* has no splits; delete it"):
        open_rows(DatasetConfig(path, split="train"))
    with pytest.raises(DataError, match="validation_dataset.name: .* is one file and has no configurations"):
        open_rows(DatasetConfig(path, name="main"), "validation_dataset")


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"unshifted": False}, "dataset.unshifted: .* set it to true"),
        ({"seq_length": 0}, "dataset.seq_length: must be at least 2"),
        ({"max_samples": 0}, "dataset.max_samples: must be at least 1"),
        ({"prompt_column": "a"}, "dataset.completion_column: must be set too, since prompt_column is"),
        ({"completion_column": "a"}, "dataset.prompt_column: must be set too, since completion_column is"),
        ({"prompt_column": "a", "completion_column": "a"}, "dataset.completion_column: is the prompt column"),
        ({"on_malformed": "skp"}, "dataset.on_malformed: 'skp' is not one of error, skip .did you mean 'skip'"),
        ({"chat_template": " "}, "dataset.chat_template: is empty"),
        ({"chat_template_kwargs": {"a b": 1}}, "dataset.chat_template_kwargs: 'a b' is no name of a template's variab"),
        ({"chat_template_kwargs": {"x": [1]}}, "dataset.chat_template_kwargs.x: must be true or false, a number, text"),
        ({"chat_template_kwargs": {"tools": 1}}, "dataset.chat_template_kwargs.tools: is set by what renders"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "dataset.chat_template_kwargs.bos_token: is set by what rend"),
        ({"chat_template_kwargs": {"supervise_reasoning": True}}, "supervise_reasoning: has a field of its own"),
    ],
)
def test_bad_values_are_refused_by_the_section(values, problem):
    with pytest.raises(ConfigError, match=problem):
        read_section(DatasetConfig, {"path_or_dataset_id": "a.jsonl", **values}, "dataset")


def test_opening_a_file_imports_nothing_heavy(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    code = (
        "import sys; from unmask.data.sources import open_rows; from unmask.config.data import DatasetConfig;"
        f"open_rows(DatasetConfig({path!r}));"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize("name, key", [("dup_list_same.json", "rows"), ("outer_duplicate.json", "version")])
def test_a_document_with_a_key_given_twice_is_refused_by_file_and_key(fixtures, name, key):
    with pytest.raises(DataError, match=f"{name}: the key '{key}' is given twice in one object"):
        open_rows(DatasetConfig(str(fixtures / "reports" / name)))


TWICE = {
    "of_the_row": (b'{"messages": [], "messages": [{"role": "assistant", "content": "a"}]}', "messages"),
    "of_a_turn": (b'{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}', "content"),
    "of_a_part": (
        b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a", "text": "b"}]}]}', "text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["lines.jsonl", "lines.json", "list.json", "object.json"])
@pytest.mark.parametrize("row, key", TWICE.values(), ids=TWICE)
def test_a_key_given_twice_makes_a_row_malformed(tmp_path, form, row, key):
    good = json.dumps(GOOD).encode()
    path = tmp_path / form
    if form.startswith("lines"):
        path.write_bytes(good + b"\n" + row + b"\n" + good)
    else:
        rows = b"[" + good + b",\n" + row + b",\n" + good + b"]"
        path.write_bytes(rows if form == "list.json" else b'{"about": {"a": [1]}, "rows":' + rows + b', "n": 3}')
    with pytest.raises(DataError, match=f"{form}:2: the key '{key}' is given twice in one object.*fix the row"):
        open_rows(DatasetConfig(str(path)))
    rows = open_rows(DatasetConfig(str(path), on_malformed="skip"))
    assert answers(rows) == ["fine", "fine"] and len(rows.skipped) == 1


def test_texts_that_a_parquet_file_stores_as_bytes_are_decoded(fixtures, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = open_rows(DatasetConfig(str(fixtures / "reports" / "binary_content.parquet")))
    assert all(isinstance(turn.content, str) and turn.content for i in range(len(rows)) for turn in rows[i].messages)


def test_bytes_that_are_not_text_are_refused_by_row_where_text_must_be(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = pa.list_(pa.struct([("role", pa.large_binary()), ("content", pa.binary())]))
    answers_in = ["Grüße".encode(), b"\xff"]
    messages = [[{"role": b"user", "content": b"q"}, {"role": b"assistant", "content": a}] for a in answers_in]
    columns = {"messages": pa.array(messages, turns), "checksum": pa.array([b"\xfe", b"\xfd"], pa.binary())}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = open_rows(DatasetConfig(str(tmp_path / "rows.parquet")))
    assert rows[0].messages[1].content == "Grüße" and rows.text_length(0) == 6
    with pytest.raises(
        DataError, match=r"rows.parquet row 1: messages\[1\].content must be text, got bytes that are not UTF-8"
    ):
        rows[1]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "data/train-00000-of-00001.parquet"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=f"{path.name}: a Git LFS pointer in place of the data; .*git lfs pull"):
        open_rows(DatasetConfig(str(tmp_path)))


@pytest.mark.parametrize("content", [b"PAR1 no parquet", b"\0" * 4096, b"PAR1" + b"x" * 999 + b"PAR1"])
def test_a_damaged_table_is_one_line_on_stderr(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as parquet: ") as caught:
        open_rows(DatasetConfig(str(tmp_path / "rows.parquet")))
    assert "An error occurred" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_changed_byte_of_a_table_is_read_or_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([chat(f"answer {n}") for n in range(20)]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole, refused = file.read_bytes(), 0
    for place in range(len(whole) - 1, 0, -len(whole) // 60):
        file.write_bytes(whole[:place] + b"\xfe" + whole[place + 1 :])
        try:
            rows = open_rows(DatasetConfig(str(tmp_path / "saved")))
            assert len([rows[index] for index in range(len(rows))]) == 20
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10
