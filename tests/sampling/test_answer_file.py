"""`unmask generate --input`: a record a row, an interrupted job that goes on, files of other jobs left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.distributed.ranks import Ranks
from unmask.errors import ConfigError
from unmask.sampling.answer_file import AnswerFile

PROMPTS = ["1 plus 1?", "so?", "1 plus 1?", "20 plus 6?", "7 plus 0?"]


def words(checkpoint: Path, folder: Path, output: str, *more: str) -> list[str]:
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    flags = ["--max_new_tokens", "8", "--temperature", "1", "--block_size", "4", "--device", "cpu"]
    return [
        "generate", "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(folder / output),
        *flags, *more,
    ]  # fmt: skip


def records(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        del record["tokens_per_second"]
    return found


def test_an_interrupted_job_goes_on_and_its_file_is_that_of_one_run(tiny_base, tmp_path, monkeypatch, capsys):
    assert main(words(tiny_base, tmp_path, "whole.jsonl")) == 0
    whole = records(tmp_path / "whole.jsonl")
    assert [record["prompt"] for record in whole] == PROMPTS
    assert whole[0]["token_ids"] != whole[2]["token_ids"]  # given twice, drawn twice
    assert {"row", "text", "finish_reason", "seed", "sampler", "nfe", "tokens_per_forward"} <= whole[0].keys()
    assert whole[0]["sampler"]["approximations"] == []

    real, added = AnswerFile.add, []

    def stop_at_third(self, row, record):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(row)
        real(self, row, record)

    monkeypatch.setattr(AnswerFile, "add", stop_at_third)
    assert main(words(tiny_base, tmp_path, "cut.jsonl", "--batch_size", "1")) == 130
    part = tmp_path / "cut.jsonl.part"
    assert not (tmp_path / "cut.jsonl").exists() and len(part.read_text().splitlines()) == 4
    with part.open("a") as file:
        file.write('{"row": 4, "tex')  # cut short by whatever killed it
    added.clear()
    monkeypatch.setattr(AnswerFile, "add", lambda self, row, record: (added.append(row), real(self, row, record))[1])
    assert main(words(tiny_base, tmp_path, "cut.jsonl", "--batch_size", "2")) == 0
    assert 0 < len(added) < len(PROMPTS)
    assert records(tmp_path / "cut.jsonl") == whole
    assert "from before" in capsys.readouterr().out and not part.exists()


def test_the_part_of_another_job_is_not_touched(tiny_base, tmp_path, capsys):
    words_ = words(tiny_base, tmp_path, "out.jsonl")
    part = tmp_path / "out.jsonl.part"
    part.write_text(json.dumps({"generation": {"seed": 1}}) + '\n{"row": 0}\n')
    before = part.read_bytes()
    assert main(words_) == 2
    assert "holds another generation" in capsys.readouterr().err
    assert part.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_parts_of_several_processes_are_taken_in(tmp_path):
    path = tmp_path / "out.jsonl"
    first = AnswerFile(path, ["a", "b", "a", "c"], {"seed": 1}, Ranks())
    assert first.open == [0, 1, 2, 3]
    first.add(1, {"text": "B"})
    first.add(0, {"text": "A"})  # its equal is missing: both are drawn again
    other = tmp_path / "out.jsonl.part3"
    other.write_text((tmp_path / "out.jsonl.part").read_text().splitlines()[0] + '\n{"row": 3, "text": "C"}\n')
    again = AnswerFile(path, ["a", "b", "a", "c"], {"seed": 1}, Ranks())
    assert again.open == [0, 2] and not other.exists()
    again.finish({0: {"text": "A"}, 2: {"text": "A2"}})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["A", "B", "A2", "C"]
    assert list(tmp_path.iterdir()) == [path]
    AnswerFile(path, ["a", "b"], {"seed": 1}, Ranks()).add(1, {"text": "B"})
    with pytest.raises(ConfigError, match=r"seed 1, not 2"):
        AnswerFile(path, ["a", "b"], {"seed": 2}, Ranks())


def test_blanks_are_filled_from_a_file(tiny_base, tmp_path):
    source, output = tmp_path / "texts.jsonl", tmp_path / "filled.jsonl"
    source.write_text('{"prompt": "it is {blank:2}."}\n{"prompt": "{blank:1-2} plus 1"}\n')
    flags = ["--checkpoint", str(tiny_base), "--input", str(source), "--output", str(output), "--device", "cpu"]
    assert main(["generate", "--infill", *flags]) == 0
    first, second = records(output)
    assert first["text"].startswith("it is ") and first["text"].endswith(".")
    assert len(first["fill_ids"][0]) == 2 and len(second["fill_ids"][0]) in (1, 2) and second["log_likelihood"] <= 0


def test_prompts_come_from_one_place(tiny_base, tmp_path, capsys):
    assert main(["generate", "--checkpoint", str(tiny_base)]) == 2
    assert "give --prompt TEXT, once or several times, or --input" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(tiny_base), "--prompt", "so?", "--input", "x.jsonl"]) == 2
    assert "prompts come from one of them" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_replaced(tiny_base, tmp_path, capsys):
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "so?"}\n')
    flags = ["--checkpoint", str(tiny_base), "--input", str(path), "--output", str(path)]
    assert main(["generate", *flags]) == 2
    assert "is there already" in capsys.readouterr().err and path.read_text() == '{"prompt": "so?"}\n'


def test_what_cannot_be_answered_is_told_before_the_weights_load(tiny_base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("unmask.distributed.answering.load_for_answers", lambda *_: pytest.fail("weights were loaded"))
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "so?"}\n{"prompt": "' + "so " * 90 + '"}\n')
    base = ["generate", "--checkpoint", str(tiny_base), "--device", "cpu"]
    output = ["--output", str(tmp_path / "out.jsonl")]
    assert main([*base, "--input", str(source), "--max_new_tokens", "8", *output]) == 2
    assert f"{source}:2: " in capsys.readouterr().err
    assert main([*base, "--prompt", "no blank", "--infill"]) == 2
    assert "no blank" in capsys.readouterr().err
    assert main([*base, "--prompt", "{blank:2}", "--infill", "--max_new_tokens", "4"]) == 2
    assert "leave it out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_job_is_of_its_weights(tiny_base, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(tiny_base.resolve(), copy, ignore=shutil.ignore_patterns("optimizer*"))
    command = words(copy, tmp_path, "out.jsonl")
    (tmp_path / "out.jsonl.part").write_text('{"generation": {"weights": "of another model"}}\n{"row": 0}\n')
    assert main(command) == 2
    assert "holds another generation (weights" in capsys.readouterr().err


def test_lengths_that_are_tried_have_titles_of_their_own(tiny_base, tmp_path, capsys):
    page = tmp_path / "trace.html"
    flags = ["--checkpoint", str(tiny_base), "--device", "cpu", "--trace", str(page)]
    assert main(["generate", "--infill", *flags, "--prompt", "it is {blank:1-2}.", "--prompt", "so {blank:1}"]) == 0
    assert "it is {blank:2}." in page.read_text() and "prompt 3" not in page.read_text()
    assert "> so {blank:1}" in capsys.readouterr().out
    before = page.read_bytes()
    assert main(["generate", *flags, "--prompt", "so " * 90]) == 2
    assert page.read_bytes() == before
