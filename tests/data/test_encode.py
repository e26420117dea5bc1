from __future__ import annotations

import dataclasses
import json

import pytest

from unmask.config.data import DatasetConfig
from unmask.data.chat import load_template, read_template
from unmask.data.conversation import Conversation, Message
from unmask.data.encode import Dropped, EncodedRow, RowEncoder, encode_row
from unmask.data.sources import open_rows
from unmask.errors import DataError

CONFIG = DatasetConfig("rows.jsonl")
ROW = Conversation((Message("user", "question"), Message("assistant", "answer")))


@pytest.fixture
def template(tokenizer):
    return load_template(tokenizer, "llada")


def test_a_row_that_fits_is_whole(template):
    row = encode_row(ROW, template, CONFIG, 1024)
    encoded = template.encode(ROW.messages)
    assert isinstance(row, EncodedRow)
    assert row.input_ids.tolist() == encoded.ids and row.supervised.tolist() == encoded.supervised and not row.cut
    exact = encode_row(ROW, template, CONFIG, len(row))
    assert isinstance(exact, EncodedRow) and not exact.cut
    assert encode_row(ROW, template, dataclasses.replace(CONFIG, truncation=False), len(row)) is not None


def test_a_long_row_is_cut_as_long_as_something_supervised_remains(template):
    encoded = template.encode(ROW.messages)
    prompt = encoded.supervised.index(True)
    row = encode_row(ROW, template, CONFIG, prompt + 1)
    assert isinstance(row, EncodedRow)
    assert row.input_ids.tolist() == encoded.ids[: prompt + 1]
    assert row.supervised.tolist() == [False] * prompt + [True] and row.cut
    assert encode_row(ROW, template, CONFIG, prompt) == Dropped("no supervised token within seq_length")


def test_without_truncation_a_long_row_is_dropped(template):
    length = len(template.encode(ROW.messages).ids)
    config = dataclasses.replace(CONFIG, truncation=False)
    assert isinstance(encode_row(ROW, template, config, length), EncodedRow)
    assert encode_row(ROW, template, config, length - 1) == Dropped("longer than seq_length, and truncation is off")


def test_mask_history_reaches_the_template(template):
    twice = Conversation(ROW.messages * 2)
    all_turns = encode_row(twice, template, CONFIG, 1024)
    last = encode_row(twice, template, dataclasses.replace(CONFIG, mask_history=True), 1024)
    assert isinstance(all_turns, EncodedRow) and isinstance(last, EncodedRow)
    assert 2 * last.supervised.sum() == all_turns.supervised.sum()


def test_a_row_that_the_template_refuses_is_named_or_skipped(tmp_path, tokenizer):
    rule = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(rule + read_template("llada"))
    strict = load_template(tokenizer, str(tmp_path / "strict.jinja"))
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns[1:]}) + "\n" + json.dumps({"messages": turns}) + "\n")
    config = DatasetConfig(str(path))
    encode = RowEncoder(open_rows(config), strict, config, "validation_dataset")
    assert isinstance(encode(0), EncodedRow)
    with pytest.raises(DataError, match="rows.jsonl:2: .*no system turns; .* validation_dataset.on_malformed: skip"):
        encode(1)
    skipping = dataclasses.replace(encode, config=dataclasses.replace(config, on_malformed="skip"))
    dropped = skipping(1)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "malformed" and "rows.jsonl:2" in dropped.detail


def test_a_malformed_table_row_is_named_or_skipped(monkeypatch, template):
    import datasets

    turns = [[{"role": "assistant", "content": "a"}], [{"role": "bot", "content": "x"}]]
    table = datasets.Dataset.from_dict({"messages": turns})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: table)
    config = DatasetConfig("someone/rows", split="train")
    encode = RowEncoder(open_rows(config), template, config)
    assert isinstance(encode(0), EncodedRow)
    with pytest.raises(DataError, match="someone/rows row 1: .*'bot'"):
        encode(1)
    dropped = dataclasses.replace(encode, config=dataclasses.replace(config, on_malformed="skip"))(1)
    assert isinstance(dropped, Dropped) and dropped.reason == "malformed" and "row 1" in dropped.detail
