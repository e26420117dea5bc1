"""`unmask generate --input`: a record a row, an interrupted job that goes on, files of other jobs left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.distributed.ranks import Ranks
from unmask.errors import ConfigError
from unmask.places import hold
from unmask.sampling.answers import AnswerFile, Printer
from unmask.sampling.jobs import load

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
    part.write_text(json.dumps({"generation": {"seed": 1}}) + '\n{"row": 0, "text": ""}\n')
    before = part.read_bytes()
    assert main(words_) == 2
    assert "holds another generation" in capsys.readouterr().err
    assert part.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_parts_of_several_processes_are_taken_in(tmp_path):
    path = tmp_path / "out.jsonl"
    first = AnswerFile(path, ["a", "b", "a", "c"], {"seed": 1}, Ranks())
    assert first.missing == [0, 1, 2, 3]
    first.add(1, {"text": "B"})
    first.add(0, {"text": "A"})  # its equal is missing: both are drawn again
    other = tmp_path / "out.jsonl.part3"
    other.write_text((tmp_path / "out.jsonl.part").read_text().splitlines()[0] + '\n{"row": 3, "text": "C"}\n')
    again = AnswerFile(path, ["a", "b", "a", "c"], {"seed": 1}, Ranks())
    assert again.missing == [0, 2] and not other.exists()
    again.finish({0: {"text": "A"}, 2: {"text": "A2"}})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["A", "B", "A2", "C"]
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "other.jsonl"
    AnswerFile(other, ["a", "b"], {"seed": 1}, Ranks()).add(1, {"text": "B"})
    with pytest.raises(ConfigError, match=r"seed 1, not 2"):
        AnswerFile(other, ["a", "b"], {"seed": 2}, Ranks())


def test_of_a_finished_job_nothing_is_left_to_do(tiny_base, tmp_path, monkeypatch, capsys):
    command = words(tiny_base, tmp_path, "out.jsonl")
    assert main(command) == 0
    path = tmp_path / "out.jsonl"
    before = path.read_bytes()
    monkeypatch.setattr("unmask.sampling.answers.load", lambda *_: pytest.fail("weights were loaded"))
    capsys.readouterr()
    assert main([*command, "--batch_size", "2"]) == 0
    printed = capsys.readouterr()
    assert "all 5 records of this job are there; nothing is left to do" in printed.out and printed.err == ""
    for other in ([*command, "--seed", "1"], [*command, "--steps", "4"]):
        assert main(other) == 2
        assert f"--output: {path} is there already, and not of this job" in capsys.readouterr().err
    for torn in (before.splitlines(keepends=True)[0], before[:-9], b"\xff\n", b"[" * 9999):
        path.write_bytes(torn)
        assert main(command) == 2
        assert path.read_bytes() == torn
    assert {each.name for each in tmp_path.iterdir()} == {"out.jsonl", "prompts.jsonl"}


def test_a_second_job_on_one_output_is_refused(tiny_base, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    with hold(tmp_path / ".out.jsonl.lock", "--output", path, "writes"):
        assert main(words(tiny_base, tmp_path, "out.jsonl")) == 2
        assert f"--output: another process (pid {os.getpid()}) writes {path}; wait" in capsys.readouterr().err
    assert main(words(tiny_base, tmp_path, "out.jsonl")) == 0


def test_blanks_are_filled_from_a_file(tiny_base, tmp_path):
    source, output = tmp_path / "texts.jsonl", tmp_path / "filled.jsonl"
    source.write_text('{"prompt": "it is {blank:2}."}\n{"prompt": "{blank:1} plus 1"}\n')
    flags = ["--checkpoint", str(tiny_base), "--input", str(source), "--output", str(output), "--device", "cpu"]
    assert main(["generate", "--infill", *flags]) == 0
    first, second = records(output)
    assert first["text"].startswith("it is ") and first["text"].endswith(".")
    assert len(first["fill_ids"][0]) == 2 and len(second["fill_ids"][0]) == 1 and second["log_likelihood"] <= 0


@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_texts_are_printed_in_their_order_and_those_of_an_interrupted_run_as_well(
    tiny_base, tmp_path, monkeypatch, capsys, stop_after
):
    command = words(tiny_base, tmp_path, "unused.jsonl", "--batch_size", "1")
    del command[command.index("--output") : command.index("--output") + 2]
    real, done = Printer.add, []

    def add(self, row, answer):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(row)
        real(self, row, answer)

    monkeypatch.setattr(Printer, "add", add)
    assert main(command) == (0 if stop_after is None else 130)
    printed = [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines() if line.startswith("> ")]
    assert done[0] == 1  # the shortest is answered first
    assert printed == [PROMPTS[row] for row in sorted(done)]


def test_a_blank_that_is_sent_as_text_is_pointed_out(tiny_base, capsys):
    base = ["generate", "--checkpoint", str(tiny_base), "--device", "cpu"]
    assert main([*base, "--prompt", "so?", "--prompt", "so {blank:2}", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().err == "prompt 1: its blank is text to the model; --infill fills blanks\n"
    assert main([*base, "--prompt", "so {{blank:2}}", "--max_new_tokens", "4"]) == 0
    assert main([*base, "--prompt", "so {blank:2}", "--infill"]) == 0
    assert capsys.readouterr().err == ""


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
    monkeypatch.setattr("unmask.sampling.answers.load", lambda *_: pytest.fail("weights were loaded"))
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
    (tmp_path / "out.jsonl.part").write_text(
        '{"generation": {"weights": "of another model"}}\n{"row": 0, "text": ""}\n'
    )
    assert main(command) == 2
    assert "holds another generation (weights" in capsys.readouterr().err


def test_a_traced_page_calls_texts_as_they_were_given_and_is_left_when_a_prompt_is_refused(tiny_base, tmp_path, capsys):
    page = tmp_path / "trace.html"
    flags = ["--checkpoint", str(tiny_base), "--device", "cpu", "--trace", str(page)]
    assert main(["generate", "--infill", *flags, "--prompt", "it is {blank:2}.", "--prompt", "so {blank:1}"]) == 0
    assert "it is {blank:2}." in page.read_text()
    assert "> so {blank:1}" in capsys.readouterr().out
    before = page.read_bytes()
    assert main(["generate", *flags, "--prompt", "so " * 90]) == 2
    assert page.read_bytes() == before


def stopped_after(answers: int, command: list[str], monkeypatch) -> list[int]:
    """Run a command, interrupt it when it has written some answers, and return their rows."""
    real, added = AnswerFile.add, []

    def stop(self, row, record):
        if len(added) == answers:
            raise KeyboardInterrupt
        added.append(row)
        real(self, row, record)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", stop)
        assert main(command) == 130
    return added


@pytest.fixture
def interrupted(tiny_base, tmp_path, monkeypatch, capsys) -> list[str]:
    """The command of a job that has answered its second prompt."""
    command = words(tiny_base, tmp_path, "cut.jsonl", "--batch_size", "1")
    answered = stopped_after(1, command, monkeypatch)
    capsys.readouterr()
    assert answered == [1]  # the shortest, so the numbers of those that are left are not those in the file
    return command


def test_a_job_that_goes_on_calls_its_rows_as_the_file_does(interrupted, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        loaded = load(*arguments)
        loaded.model.transformer.ff_out.weight.data.fill_(float("nan"))
        return loaded

    monkeypatch.setattr("unmask.sampling.answers.load", broken)
    assert main([*interrupted, "--batch_size", "4"]) == 2
    message = capsys.readouterr().err
    assert all(f"{tmp_path / 'prompts.jsonl'}:{line} (" in message for line in (1, 3, 4, 5)) and ":2 (" not in message


def test_watching_a_job_that_goes_on_shows_the_prompts_that_are_asked(interrupted, capsys):
    assert main([*interrupted, "--watch"]) == 0
    shown = [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines() if line.startswith("> ")]
    assert sorted(shown) == sorted(PROMPTS[:1] + PROMPTS[2:])


@pytest.mark.parametrize("flags", [[], ["--infill"], ["--raw"]])
def test_half_a_surrogate_pair_is_refused_by_its_place(tiny_base, tmp_path, capsys, flags):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "so {blank:1}"}\n{"prompt": "so {blank:1} \\ud83d"}\n')
    base = ["generate", "--checkpoint", str(tiny_base), "--device", "cpu", *flags]
    assert main([*base, "--input", str(source), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert f"{source}:2: prompt holds half a surrogate pair" in capsys.readouterr().err
    assert main([*base, "--prompt", "so {blank:1} \ud83d"]) == 2
    assert "prompt 0 holds half a surrogate pair" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("line", "flags", "says"),
    [
        ('{"prompt": "so {blank:900}"}', ["--infill"], "tokens are over the model's max_sequence_length"),
        ('{"prompt": "so"}', ["--infill"], "there is no blank"),
        ('{"messages": [{"role": "user", "content": "so"}]}', ["--raw"], "goes through the chat template"),
    ],
)
def test_a_row_that_cannot_be_answered_is_named_before_the_weights_load(
    tiny_base, tmp_path, capsys, monkeypatch, line, flags, says
):
    monkeypatch.setattr("unmask.sampling.answers.load", lambda *_: pytest.fail("weights were loaded"))
    source = tmp_path / "prompts.jsonl"
    source.write_text('\n{"prompt": "so {blank:1}"}\n' + line)
    flags = [*flags, "--checkpoint", str(tiny_base), "--device", "cpu", "--input", str(source)]
    assert main(["generate", *flags, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert f"{source}:3: " in (message := capsys.readouterr().err) and says in message


def test_a_file_of_answers_is_a_file_of_prompts(tiny_base, tmp_path):
    chat = {"prompt": [{"role": "user", "content": "so?"}]}
    source, first, second = (tmp_path / f"{name}.jsonl" for name in ("prompts", "first", "second"))
    source.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "so?"}, chat, {"prompt_ids": [1, 2]})))
    flags = ["--checkpoint", str(tiny_base), "--device", "cpu", "--max_new_tokens", "2"]
    assert main(["generate", *flags, "--input", str(source), "--output", str(first)]) == 0
    assert main(["generate", *flags, "--input", str(first), "--output", str(second)]) == 0
    assert records(first) == records(second)


def test_an_interrupted_infill_of_texts_that_share_a_length_goes_on_as_one_run(tiny_base, tmp_path, monkeypatch):
    texts = ["it is {blank:3} so", "it is {blank:4} so", "it is {blank:4} so"]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = ["--checkpoint", str(tiny_base), "--input", str(source), "--device", "cpu", "--temperature", "1"]
    command = ["generate", "--infill", *flags, "--batch_size", "1", "--output"]
    assert main([*command, str(tmp_path / "whole.jsonl")]) == 0
    assert stopped_after(2, [*command, str(tmp_path / "cut.jsonl")], monkeypatch) == [0, 1]
    assert main([*command, str(tmp_path / "cut.jsonl")]) == 0
    assert records(tmp_path / "cut.jsonl") == records(tmp_path / "whole.jsonl")
