from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from unmask.config.data import DatasetConfig
from unmask.data.prep import PREPARERS, prep_gsm8k
from unmask.data.sources import open_rows
from unmask.errors import DataError

ROW = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "question": "¿Y?"}) + "\n")
    (folder / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    return folder


def test_a_local_copy_becomes_chats_that_open(tmp_path, source):
    train, test = PREPARERS["gsm8k"](str(source), tmp_path / "new" / "out")
    assert (train.name, test.name) == ("gsm8k_chat_train.jsonl", "gsm8k_chat_test.jsonl")
    rows = open_rows(DatasetConfig(str(train)))
    assert len(rows) == 2 and len(open_rows(DatasetConfig(str(test)))) == 1
    assert [(turn.role, turn.content) for turn in rows[1].messages] == [("user", "¿Y?"), ("assistant", ROW["answer"])]
    assert sorted(path.name for path in train.parent.iterdir()) == [test.name, train.name]


def test_one_split(tmp_path, source):
    assert [path.name for path in prep_gsm8k(str(source), tmp_path, "test")] == ["gsm8k_chat_test.jsonl"]
    with pytest.raises(DataError, match="--split: 'tets' is not one of train, test, all .did you mean 'test'"):
        prep_gsm8k(str(source), tmp_path, "tets")


def test_the_hub_is_asked_for_the_main_configuration(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(dataset_id, name, split):
        asked.append((dataset_id, name, split))
        return datasets.Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load)
    prep_gsm8k(None, tmp_path)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert len(open_rows(DatasetConfig(str(tmp_path / "gsm8k_chat_test.jsonl")))) == 1


def test_a_missing_source_is_named(tmp_path, source):
    with pytest.raises(DataError, match="--source: .*/nowhere is no folder with train.jsonl"):
        prep_gsm8k(str(tmp_path / "nowhere"), tmp_path)
    (source / "test.jsonl").unlink()
    with pytest.raises(DataError, match="holds no test.jsonl"):
        prep_gsm8k(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line, problem", [('{"question": "x"}', "no column 'answer'"), ("{torn", "is not JSON")])
def test_a_malformed_source_leaves_the_old_output_alone(tmp_path, source, line, problem):
    old = tmp_path / "gsm8k_chat_train.jsonl"
    old.write_text("old")
    (source / "train.jsonl").write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(DataError, match=problem):
        prep_gsm8k(str(source), tmp_path, "train")
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [old.name]


def test_an_output_that_cannot_be_written_is_named(tmp_path, source):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written: .*; choose another --output"):
        prep_gsm8k(str(source), tmp_path / "file")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    source = tmp_path / "gsm8k"
    source.mkdir()
    (source / "test.jsonl").write_text('{"question": "1 plus 1?", "answer": "2\\n#### 2"}\n')
    before = os.umask(0o027)
    try:
        (path,) = prep_gsm8k(str(source), tmp_path / "out", "test")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
