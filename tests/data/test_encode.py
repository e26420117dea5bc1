from __future__ import annotations

import dataclasses
import json

import pytest

from unmask.config.data import DatasetConfig
from unmask.data.conversation import Conversation, Message
from unmask.data.encode import Dropped, EncodedRow, RowEncoder, encode_row
from unmask.data.sources import open_rows
from unmask.data.template_loading import load_template
from unmask.data.template_source import read_template
from unmask.errors import DataError

ROW = (Message("user", "question"), Message("assistant", "answer"))


def encode(template, **changes) -> EncodedRow | Dropped:
    return encode_row(Conversation(ROW), template, DatasetConfig("rows.jsonl", **changes), last_only=False)


@pytest.fixture
def template(tokenizer):
    return load_template(tokenizer, "llada")


def test_a_row_that_fits_is_whole(template):
    row = encode(template)
    encoded = template.encode(ROW)
    assert isinstance(row, EncodedRow)
    assert row.input_ids.tolist() == encoded.ids and row.supervised.tolist() == encoded.supervised and not row.cut
    exact = encode(template, seq_length=len(row))
    assert isinstance(exact, EncodedRow) and not exact.cut


def test_a_long_row_is_cut_as_long_as_something_supervised_remains(template):
    encoded = template.encode(ROW)
    prompt = encoded.supervised.index(True)
    row = encode(template, seq_length=prompt + 1)
    assert isinstance(row, EncodedRow)
    assert row.input_ids.tolist() == encoded.ids[: prompt + 1]
    assert row.supervised.tolist() == [False] * prompt + [True] and row.cut
    assert encode(template, seq_length=prompt) == Dropped("no supervised token within seq_length")


def test_without_truncation_a_long_row_is_dropped(template):
    length = len(template.encode(ROW).ids)
    assert isinstance(encode(template, seq_length=length, truncation=False), EncodedRow)
    dropped = encode(template, seq_length=length - 1, truncation=False)
    assert dropped == Dropped("longer than seq_length, and truncation is off")


def test_a_row_that_the_template_refuses_is_named_or_skipped(tmp_path, tokenizer):
    rule = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(rule + read_template("llada"))
    strict = load_template(tokenizer, str(tmp_path / "strict.jinja"))
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns[1:]}) + "\n" + json.dumps({"messages": turns}) + "\n")
    config = DatasetConfig(str(path), answers="all")
    encode = RowEncoder(open_rows(config), strict, config, where="validation_dataset")
    assert isinstance(encode(0, 0), EncodedRow)
    with pytest.raises(DataError, match="rows.jsonl:2: .*no system turns; .* validation_dataset.on_malformed: skip"):
        encode(1, 0)
    skipping = dataclasses.replace(encode, config=dataclasses.replace(config, on_malformed="skip"))
    dropped = skipping(1, 0)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "malformed" and "rows.jsonl:2" in dropped.detail


def test_a_malformed_table_row_is_named_or_skipped(monkeypatch, template):
    import datasets

    turns = [[{"role": "assistant", "content": "a"}], [{"role": "bot", "content": "x"}]]
    table = datasets.Dataset.from_dict({"messages": turns})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table)
    config = DatasetConfig("someone/rows", split="train", answers="all")
    encode = RowEncoder(open_rows(config), template, config)
    assert isinstance(encode(0, 0), EncodedRow)
    with pytest.raises(DataError, match="someone/rows row 1: .*'bot'"):
        encode(1, 0)
    dropped = dataclasses.replace(encode, config=dataclasses.replace(config, on_malformed="skip"))(1, 0)
    assert isinstance(dropped, Dropped) and dropped.reason == "malformed" and "row 1" in dropped.detail
