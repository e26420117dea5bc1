"""A report is one page of what the run directories hold, and of nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask.cli import main
from unmask.errors import DataError
from unmask.report.report import write_report
from unmask.report.runs import differing, distinct_names, find_results, shown

LEVELS = [1.0, 2.0, None, 4.0, 5.0]


def write_run(root: Path, lr: float = 1e-3, steps: int = 30, terms: bool = False) -> Path:
    """Write a run directory as training leaves it."""
    root.mkdir(parents=True)
    versions = {"unmask": "1.0", "torch": "2.9"}
    environment = {"python": "3.11", "device": "A CPU <with brackets>"}
    events: list[dict[str, Any]] = [
        {"event": "run", "step": 0, "total_steps": steps, "rows": 2000, "parameters": 1_234_567, "versions": versions,
         "environment": environment}
    ]  # fmt: skip
    for step in range(1, steps + 1):
        loss = 8 / step + lr
        losses = {"diffusion_loss": loss, "encoder_loss": loss / 2} if terms else {"mdlm_loss": loss}
        events.append(
            {"event": "train", "step": step, "loss": loss, **losses, "grad_norm": 1.0, "lr": lr, "tokens": 100,
             "tokens_per_second": 500.0, "memory_gib": 1.5, "time": 1000.0 + step}
        )  # fmt: skip
        if step % 10 == 0:
            levels = [None if value is None else value / step for value in LEVELS]
            events.append({"event": "validation", "step": step, "loss": loss, "loss_by_noise_level": levels})
            events.append({"event": "exact_match", "step": step, "exact_match": step / 100, "right": 1, "total": 2})
    events.append({"event": "best", "step": steps, "metric": "validation_loss", "value": 0.25})
    events.append({"event": "end", "step": steps, "reason": "finished"})
    lines(root / "metrics.jsonl", events)
    frames = [{"nfe": 1, "text": "░░ 5"}, {"nfe": 2, "text": "it is 5"}]
    sample = {"row": "f:1", "prompt": "2 & 3?", "reference": "5", "correct": True, "nfe": 2, "frames": frames}
    lines(
        root / "samples.jsonl",
        [
            {"event": "sample", "step": 10, "text": "early", **sample, "correct": False},
            {"event": "sample", "step": 20, "text": "</script><b>it is 5", **sample},
        ],
    )
    config = {"optimizer": {"lr": lr}, "checkpoint": {"checkpoint_dir": str(root)}, "dllm": {"normalization": "token"}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_results(folder: Path, share: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    answers = {"task": "gsm8k", "model": "after", "exact_match": share, "low": 0.4, "high": 0.6, "total": 100}
    bound = {"task": "likelihood", "model": "after", "rows": 9, "nats_per_token": 1.25, "standard_error": 0.01}
    theirs = {"task": "arc", "model": "after", "metrics": {"acc": {"value": 0.25, "standard_error": None}}}
    (folder / "results.json").write_text(json.dumps({"models": [], "results": [answers, bound, theirs]}))
    return folder


class Page(HTMLParser):
    """The elements of a page, what must be closed being closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def figures(text: str) -> list[str]:
    return re.findall(r"<figcaption>([^<]+?)(?: <span|<)", text)


def test_one_run_has_everything_that_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "one")
    assert main(["report", str(root)]) == 0
    text = (root / "report.html").read_text()
    assert str(root / "report.html") in capsys.readouterr().out
    page = Page(text)
    assert figures(text) == [
        "Training loss", "Validation loss", "Validation by noise level", "Exact match", "Gradient norm",
        "Learning rate", "Speed", "Peak memory",
    ]  # fmt: skip
    assert "80–100 %" in text and "40–60 %</text>" not in text  # that fifth was never measured
    for part in ("1,234,567", "validation_loss 0.25 (step 30)", "30 % (step 30)", "A CPU <with brackets>", "2 & 3?"):
        assert part in page.text, part
    assert "What differs" not in text and "Evaluation</h2>" not in text


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = write_report([write_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "srcset"} & attributes.keys()
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text and "url(#" in text
    assert len(text) < 60_000


def test_what_a_model_wrote_cannot_end_the_page(tmp_path: Path) -> None:
    text = write_report([write_run(tmp_path / "one")], tmp_path / "r.html").read_text()
    assert "<b>it is" not in text and text.count("</script>") == 2  # the frames and the page's own


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "full", 1e-3, terms=True), write_run(tmp_path / "lora", 2e-3)]
    text = write_report(runs, tmp_path / "both.html").read_text()
    page = Page(text)
    assert figures(text)[:6] == [
        "Training loss", "Training loss: diffusion", "Training loss: encoder", "Validation loss",
        "Validation by noise level, full", "Validation by noise level, lora",
    ]  # fmt: skip
    different = text[text.index("What differs") : text.index("Curves")]
    assert re.findall(r'<th scope="row">([^<]+)<', different) == ["optimizer.lr"]
    assert "0.001" in different and "0.002" in different
    assert page.text.count("configuration of ") == 2


def test_equal_configurations_are_said_to_be_equal(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert "the same but for the run directory" in write_report(runs, tmp_path / "r.html").read_text()


def test_evaluations_are_found_and_can_be_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one")
    write_results(root / "evaluation")
    other = write_results(tmp_path / "elsewhere", 0.25)
    found = find_results([root], [other, root / "evaluation"])
    assert len(found) == 6
    label = f"after ({other})"  # two folders have results of that name
    assert found[0].cells()[:6] == ["gsm8k", label, "exact match", "25.0 %", "40.0 % to 60.0 %", "100"]
    found = find_results([root], [])
    assert found[1].cells()[:6] == ["likelihood", "after", "bound, nats per token", "1.250", "1.230 to 1.270", "9"]
    assert main(["report", str(root), "-o", str(tmp_path / "r.html"), "--evaluation", str(other)]) == 0
    assert "25.0 %" in (tmp_path / "r.html").read_text()


def test_an_evaluation_shows_its_settings_and_what_differs(tmp_path: Path) -> None:
    entry = {"task": "gsm8k", "model": "run", "exact_match": 0.5, "low": 0.4, "high": 0.6, "total": 9, "batch_size": 4,
             "compared": {"against": {"rows": 9, "differing": 2, "gained": 1, "lost": 0}},
             "settings": {"seed": 42, "questions": "0af", "stops": [], "sampler": {"steps": 8}}}  # fmt: skip
    harness = {"task": "lm_eval/x", "model": "run", "metrics": {"acc": {"value": 0.0, "standard_error": 0.0}}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"models": [], "results": [entry, harness]}))
    found = [result.cells() for result in find_results([], [tmp_path])]
    assert found[0][6:] == [
        "+1 −0, 2 of 9 differ from an earlier evaluation", "seed 42, steps 8, batch_size 4",
    ]  # fmt: skip
    assert found[1][3:5] == ["0", ""]


def test_models_stand_next_to_each_other_and_empty_columns_are_left_out(tmp_path: Path) -> None:
    scores = [{"task": task, "model": model, "exact_match": 0.5, "low": 0.4, "high": 0.6, "total": 9}
              for model in ("before", "after") for task in ("gsm8k", "text")]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"models": [], "results": scores}))
    run = write_run(tmp_path / "run")
    page = write_report([run], tmp_path / "r.html", [tmp_path]).read_text()
    section = page.split("<h2>Evaluation</h2>")[1].split("</section>")[0]
    assert re.findall(r"<th>([^<]+)</th>", section) == ["task", "of", "measured", "value", "95 % interval", "n"]
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(\w+)</td>', section)
    assert rows == [("gsm8k", "before"), ("gsm8k", "after"), ("text", "before"), ("text", "after")]


def test_settings_are_said_once_for_the_models_that_share_them(tmp_path: Path) -> None:
    scores = [{"task": task, "model": model, "exact_match": 0.5, "low": 0.4, "high": 0.6, "total": 9,
               "batch_size": size, "settings": {"seed": 42, "questions": "0af", "stops": [], "sampler": {"steps": 8}}}
              for task, model, size in (("gsm8k", "a", 4), ("gsm8k", "b", 4), ("text", "a", 4), ("text", "b", 8))
              ]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"models": [], "results": scores}))
    page = write_report([write_run(tmp_path / "run")], tmp_path / "r.html", [tmp_path]).read_text()
    assert re.findall(r'<p class="soft">([^<]*batch_size \d)</p>', page) == [
        "gsm8k: seed 42, steps 8, batch_size 4",
        "text of a: seed 42, steps 8, batch_size 4",
        "text of b: seed 42, steps 8, batch_size 8",
    ]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [(0.0003, 0.00002, "0.000300"), (1.25, 0.02, "1.250"), (1e80, None, "1e+80"), (0.0003, 0.0, "0.0003"),
     (250.0, 30.0, "250")],
)  # fmt: skip
def test_a_number_has_the_digits_that_it_is_known_to(value: float, error: float | None, said: str) -> None:
    assert shown(value, error) == said


@pytest.mark.parametrize(
    ("last", "said"),
    [({"event": "train", "step": 31, "loss": 1.0, "time": 90_007.0}, "31 of 40, not ended"),
     ({"event": "end", "step": 30, "reason": "loss is nan"}, "30, loss is nan")],
)  # fmt: skip
def test_a_resumed_run_ends_as_its_last_stretch_did_and_its_downtime_is_no_training(
    tmp_path: Path, last: dict, said: str
) -> None:
    root = write_run(tmp_path / "one")
    log = root / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    events[-1] |= {"reason": "interrupted"}
    events.append({"event": "run", "step": 30, "total_steps": 40})
    more = [{"event": "train", "step": 30, "loss": 1.0, "time": 90_000.0}] * (last["event"] == "train")
    lines(log, [*events, *more, last])
    text = Page(write_report([root], tmp_path / "r.html").read_text()).text
    assert said in text and "interrupted" not in text
    assert ("0 min 36 s" if more else "0 min 29 s") in text  # 29 s of the first stretch and 7 s of the second


def test_an_older_run_without_the_newer_fields_still_has_a_report(tmp_path: Path) -> None:
    root = tmp_path / "old"
    root.mkdir()
    train = {"event": "train", "step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3}
    lines(root / "metrics.jsonl", [train, {"event": "validation", "step": 1, "loss": 2.0}])
    assert figures(write_report([root], tmp_path / "r.html").read_text())[:2] == ["Training loss", "Validation loss"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda root: None, "no metrics.jsonl here; give the run directory"),
        (lambda root: write_run(root, steps=0), "the log has no finished step to report yet"),
        (lambda root: (write_run(root) / "config.yaml").write_text("- :"), "no readable configuration"),
        (lambda root: (write_run(root) / "samples.jsonl").write_text("{\n{}\n"), "samples.jsonl:1: not an event"),
        (lambda root: (write_results(write_run(root) / "e") / "results.json").write_text("{}"), "not a file of"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], Any], said: str
) -> None:
    prepare(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "r.html").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one")
    with pytest.raises(DataError, match="is a folder or lies in none"):
        write_report([root], tmp_path / "nowhere" / "r.html")
    with pytest.raises(DataError, match=r"--evaluation: .* has no results\.json"):
        write_report([root], tmp_path / "r.html", [tmp_path])
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_names_tell_runs_apart() -> None:
    assert distinct_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/run"), Path("/b/run")]) == ["a/run", "b/run"]
    assert distinct_names([Path("/a/run"), Path("/a/run")]) == ["run (1)", "run (2)"]


def test_differing_fields_are_dotted_and_missing_ones_are_none() -> None:
    one, two = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "d": {"e": 3}}
    assert differing([one, two]) == {"a.b": [1, 2], "d.e": [None, 3]}
