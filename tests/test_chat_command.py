"""`unmask chat`: a conversation through a pipe and at a terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from unmask.cli import build_parser, main
from unmask.config.sampler import SamplerConfig
from unmask.sampling import view
from unmask.sampling.chat import Conversation, Talk
from unmask.sampling.generate import Generation, Stats
from unmask.sampling.jobs import as_loaded


@pytest.fixture(scope="module")
def checkpoint(fixtures: Path, tmp_path_factory) -> str:
    """A small checkpoint with a context of 96 tokens."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(fixtures / "mdlm_step", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_sequence_length": 96}))
    return str(folder)


@pytest.fixture
def chat(checkpoint, monkeypatch, capsys):
    """Return a function that pipes lines into `unmask chat` and returns its status, output and errors."""

    def run(text: str | bytes, *flags: str, checkpoint: str = checkpoint):
        raw = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False))
        settings = ("--max_new_tokens", "6", "--steps", "3", "--device", "cpu", "--eos", "suppress")
        status = main(["chat", "--checkpoint", checkpoint, *settings, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def parts(fixtures: Path):
    """A model of a context of 64 tokens with its tokenizer, and its template."""
    from unmask.data.template_loading import load_template
    from unmask.models.loading import load_model
    from unmask.models.tokenizer import load_tokenizer

    folder = str(fixtures / "mdlm_step")
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    model.config = dataclasses.replace(model.config, max_sequence_length=64)
    return as_loaded(model, tokenizer), load_template(tokenizer, for_training=False)


@pytest.fixture
def typed(parts, monkeypatch):
    """Return a function that types lines (or raises, for an exception) at a terminal and returns what it shows."""

    def run(*lines: str | type[BaseException]) -> str:
        waiting = iter(lines)

        def read(prompt: str) -> str:
            line = next(waiting, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, no_color=False, width=200, color_system=None, _environ={})
        sampler = SamplerConfig(max_new_tokens=6, steps=3, eos="suppress")
        loaded, template = parts
        talk = Talk(loaded, template, console, True)
        assert talk.run(Conversation(lambda given: loaded.with_sampler(given).settings, sampler=sampler)) == 0
        assert next(waiting, None) is None  # nothing was left unread
        return out.getvalue()

    return run


def test_each_line_of_a_pipe_is_a_turn_and_the_history_goes_along(chat, tmp_path, checkpoint):
    path = tmp_path / "talk.jsonl"
    status, out, err = chat(f"first thing\n\n//second\n/save {path}\n/quit\nnever read\n", "--system", "Be brief.")
    assert status == 0 and "4 turns" not in out and f"5 turns added to {path} as row 1" in err
    turns = json.loads(path.read_text("utf-8"))["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[3]["content"] == "/second"
    assert out == "".join(f"> {turns[i]['content']}\n{turns[i + 1]['content']}\n\n" for i in (1, 3))

    import unmask
    from unmask.sampling.generate import generate

    sampler = SamplerConfig(max_new_tokens=6, steps=3, eos="suppress")
    model, tokenizer = unmask.load_model(checkpoint), unmask.load_tokenizer(checkpoint)
    (expected,) = generate(model, [turns[:4]], tokenizer=tokenizer, sampler=sampler)
    assert expected.text == turns[4]["content"]


def test_a_long_conversation_says_what_it_leaves_out(chat):
    status, out, err = chat("one two three four\n" * 12)
    assert status == 0 and out.count("> ") == 12
    assert "the context is full: the oldest 2 turns are left out" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/rest\n", ["'/rest'", "did you mean '/reset'"]),
        ("word " * 100, ["this turn", "tokens", "--max_new_tokens"]),
        (b"caf\xe9\n", ["standard input: line 1", "UTF-8"]),
        ("/steps 0\n", ["/steps", "at least 1"]),
    ],
)
def test_a_mistake_in_a_pipe_ends_the_run_with_one_line(chat, text, words):
    status, out, err = chat(text)
    assert status == 2 and out == "" and err.startswith("unmask: error: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_half_a_surrogate_pair_is_refused_as_a_system_turn_and_a_lone_space_is_no_turn(chat):
    status, out, err = chat("hi\n", "--system", "s \udcff")
    assert status == 2 and out == "" and "--system holds half a surrogate pair" in err
    assert chat("\u200b\n \n")[:2] == (0, "")


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(chat, checkpoint, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    status, _, err = chat("hi\n", checkpoint=str(bare))
    assert status == 2 and "no chat template" in err and "--chat_template" in err and "--raw" in err
    (bare / "strict.jinja").write_text("{{ raise_exception('one turn only') if messages | length > 1 }}")
    status, _, err = chat("hi\n", "--chat_template", str(bare / "strict.jinja"), checkpoint=str(bare))
    assert status == 2 and "one turn only" in err and err.count("\n") == 1
    (bare / "plain.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert chat("hi\n", "--chat_template", str(bare / "plain.jinja"), checkpoint=str(bare))[0] == 0


def test_an_approximate_sampler_is_named_as_one(chat):
    assert "approximate" not in chat("hi\n")[2]
    status, _, err = chat("hi\n", "--cache", "dual")
    assert status == 0 and err.startswith("approximate sampling: ")


def test_several_processes_do_not_share_a_terminal(monkeypatch):
    from unmask.commands.chat import run
    from unmask.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        run(build_parser().parse_args(["chat", "--checkpoint", "c"]))


def test_answers_are_drawn_at_a_terminal_and_mistakes_are_only_reported(typed):
    shown = typed("hi there", KeyboardInterrupt, "/stps", "/steps 2", "again")
    assert any(shade in shown for shade in "░▒▓")
    assert "6 tokens, 3 calls (2.0 a call)" in shown and "6 tokens, 2 calls (3.0 a call)" in shown
    assert "error: '/stps'" in shown and "steps: 2" in shown


def test_ctrl_c_stops_an_answer_and_forgets_the_question(typed, monkeypatch, tmp_path):
    path, draw, calls = tmp_path / "talk.jsonl", view.Watcher.__call__, []

    def interrupted(self, event) -> None:
        draw(self, event)
        calls.append(event)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(view.Watcher, "__call__", interrupted)
    shown = typed("hi there", "what now", f"/save {path}")
    assert "interrupted" in shown and "2 turns added" in shown
    assert [turn["content"] for turn in json.loads(path.read_text("utf-8"))["messages"]][0] == "what now"


def test_what_was_thought_is_saved_and_not_said_again(typed, parts, monkeypatch, tmp_path):
    asked, path = [], tmp_path / "talk.jsonl"

    def answer(talk: Talk, conversation: Conversation, prompt_ids: list[int]) -> Generation:
        asked.append(parts[0].tokenizer.decode(prompt_ids))
        return Generation([5], "4", "eos", prompt_ids, Stats(1, 1.0, 0.1, 10.0), "Two and two.")

    monkeypatch.setattr(Talk, "_answer", answer)
    typed("2+2?", "and 3+3?", f"/save {path}")
    assert "4" in asked[1] and "Two and two" not in asked[1]
    turns = json.loads(path.read_text("utf-8"))["messages"]
    assert [turn.get("reasoning_content") for turn in turns] == [None, "Two and two.", None, "Two and two."]


def test_a_question_too_long_for_the_context_leaves_the_conversation_as_it_was(typed, tmp_path):
    path = tmp_path / "talk.jsonl"
    shown = typed("hi", "word " * 100, f"/save {path}")
    assert "error: this turn:" in shown and "2 turns added" in shown


def test_an_answer_as_long_as_the_context_is_refused_before_the_weights_load(chat, monkeypatch):
    monkeypatch.setattr("unmask.sampling.chat.load", lambda *_: pytest.fail("weights were loaded"))
    status, _, err = chat("so?\n", "--max_new_tokens", "96")
    assert status == 2 and "--max_new_tokens: answers of 96 tokens leave no room" in err


def test_without_a_length_the_answer_leaves_a_short_context_room_for_the_turn(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"hello\n"), isatty=lambda: False))
    assert main(["chat", "--checkpoint", checkpoint, "--threshold", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("> hello\n")
