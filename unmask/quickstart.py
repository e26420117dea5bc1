"""`unmask quickstart`: train, evaluate and sample a small network from scratch, on a CPU, in minutes, offline.

The same configuration, training, evaluation and generation code as everything else; only the problems are made here:
arithmetic word problems in GSM8K's answer format. A held-out problem shares its operands and operator (23 + 4, say)
with no training problem, whatever names and things.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from torch import nn

from unmask.assemble import run_training
from unmask.config import load_config
from unmask.config.sampler import SamplerConfig
from unmask.data.conversation import Message
from unmask.data.template_source import read_template
from unmask.distributed.runtime import fast_bf16
from unmask.errors import CheckpointError
from unmask.evaluation.exact_match import score_answers
from unmask.evaluation.tasks import Question
from unmask.models.loading import build_model, load_model
from unmask.models.registry import family_named
from unmask.models.tokenizer import load_tokenizer, train_tokenizer
from unmask.places import hold, lock_beside
from unmask.prepare import prepare
from unmask.rng import generator
from unmask.sampling.view import watch

TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 20_000, 80, 120
PROMISED = 0.90  # exact match on the test problems after training
# Exact match on the validation problems that ends training, and how many times running: once alone is partly luck, and
# the test problems have to be right as well.
GOOD_ENOUGH, IN_A_ROW = 0.975, 3
CONFIG, RUN, TOKENIZER = "quickstart.yaml", "run", "tokenizer"

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
_THINGS = ("apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps")
# operator → stories; {n}ame, {t}hings, operands {a} and {b}
_STORIES: dict[str, tuple[str, ...]] = {
    "+": (
        "{n} has {a} {t} and buys {b}. How many now?",
        "{n} finds {a} {t}, then {b} more. How many now?",
    ),
    "-": (
        "{n} has {a} {t} and loses {b}. How many now?",
        "{n} had {a} {t} but sold {b} of them. How many now?",
    ),
}
# First and second operands: every result has two digits, with and without a carry.
FIRST, SECOND = range(20, 91), range(2, 7)


def learned() -> Callable[[Mapping[str, Any]], bool]:
    """Return a judge of what each validation measured: True once the last `IN_A_ROW` of them were good enough."""
    good = 0

    def judge(measured: Mapping[str, Any]) -> bool:
        nonlocal good
        good = good + 1 if measured.get("exact_match", 0.0) >= GOOD_ENOUGH else 0
        return good >= IN_A_ROW

    return judge


def quickstart(root: Path, seed: int = 42, own_process: bool = False) -> int:
    """Make problems, train until the validation problems are solved, show exact match before and after.

    Args:
        root: folder for everything; an earlier quickstart in it is replaced, anything else is refused.
        own_process: whether this process does nothing else (`run_training`).

    Returns:
        exit status: 0, or 1 when the trained model solves fewer held-out problems than promised.
    """
    with hold(lock_beside(root), "--output", root, "works in"):
        return _quickstart(root, seed, own_process)


def _quickstart(root: Path, seed: int, own_process: bool) -> int:
    began = time.monotonic()
    clear(root)
    train, held_out = make_problems(TRAIN_ROWS, VALIDATION_ROWS + TEST_ROWS, seed)
    validation, test = held_out[:VALIDATION_ROWS], held_out[VALIDATION_ROWS:]

    console = Console(highlight=False)
    console.print(
        f"{len(train):,} arithmetic problems to train on, {len(held_out)} held out: no training problem has their "
        f"operands and operator. One of them:\n  {test[0].question}\n  " + test[0].answer.replace("\n", "\n  "),
        markup=False,
    )
    write_run(root, train, validation, configuration(root, seed))

    prepared = prepare(load_config(root / CONFIG))
    tokenizer = load_tokenizer(str(root / TOKENIZER))
    assert prepared.config.validation is not None
    sampler = prepared.config.validation.settings()
    # The weights that training starts from.
    before = score(build_model(prepared.plan, None, seed=seed), tokenizer, test, sampler)
    outcome = run_training(prepared, console, is_good_enough=learned(), own_process=own_process)
    if outcome.reason.startswith("SIG"):
        console.print(f"stopped after step {outcome.step}; run the quickstart again to start over", markup=False)
        return 0
    after = _show_answers(console, root, test, sampler)
    _show_results(console, root, test, sampler, before, after, time.monotonic() - began)
    return 0 if after >= PROMISED else 1


def clear(root: Path) -> None:
    """Make room for a new quickstart; CheckpointError when the folder holds something else."""
    if not root.exists():
        return
    if not root.is_dir() or (any(root.iterdir()) and not (root / CONFIG).is_file()):
        raise CheckpointError(f"--output: {root} exists and is no earlier quickstart; choose a new folder")
    # What tells a quickstart's folder goes last; the folder itself stays, as it may be a link or a mount.
    for path in sorted(root.iterdir(), key=lambda path: path.name == CONFIG):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_run(root: Path, train: Sequence[Problem], validation: Sequence[Problem], values: Mapping[str, Any]) -> None:
    """Write what a run on the problems needs: chat JSONL, a tokenizer trained on them, and the configuration.

    `values` is the configuration, of a fresh model. Raises CheckpointError when the folder cannot be written.
    """
    fresh = values["model"]["config"]
    family = family_named(fresh, "model.config")
    assert family.control_tokens is not None and family.chat_template is not None
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Written first: it marks the folder as a quickstart's, so that a killed one can be replaced.
        (root / CONFIG).write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
        for name, problems in (("train", train), ("validation", validation)):
            lines = (json.dumps(problem.row()) + "\n" for problem in problems)
            (root / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"--output: {root} cannot be written ({error.strerror}); choose another folder") from None
    texts = [
        text for problem in train[:2000] for text in (f"user\n\n{problem.question}", f"assistant\n\n{problem.answer}")
    ]
    tokenizer = train_tokenizer(texts, family.parse_config(fresh, "model.config").vocab_size, family.control_tokens)
    tokenizer.chat_template = read_template(family.chat_template)
    tokenizer.save_pretrained(root / TOKENIZER)


def configuration(root: Path, seed: int) -> dict[str, Any]:
    """Return the quickstart's configuration (quickstart.yaml) for a folder."""
    values = yaml.safe_load(files("unmask").joinpath("quickstart.yaml").read_text("utf-8"))
    for name in ("dataset", "validation_dataset"):
        values[name] |= {key: str(root / values[name][key]) for key in ("path_or_dataset_id", "tokenizer")}
    values["checkpoint"]["checkpoint_dir"] = str(root / RUN)
    values["distributed"]["autocast_dtype"] = "bfloat16" if fast_bf16() else "float32"
    return values | {"seed": seed}


def score(model: nn.Module, tokenizer: Any, problems: Sequence[Problem], sampler: SamplerConfig) -> float:
    """Return the share of problems that the model solves, its answers sampled as `unmask generate` would."""
    questions = [Question((Message("user", problem.question),), problem.answer) for problem in problems]
    return score_answers(model, questions, tokenizer=tokenizer, sampler=sampler, batch_size=64).exact_match


def _show_answers(console: Console, root: Path, test: Sequence[Problem], sampler: SamplerConfig) -> float:
    """Draw two answers as they are denoised; return the share of test problems that the trained model solves."""
    run = str(root / RUN)
    model, tokenizer = load_model(run), load_tokenizer(run)
    for problem in test[:2]:
        console.print(f"\n> {problem.question}", markup=False)
        watch(model, problem.question, tokenizer, sampler, console)
    return score(model, tokenizer, test, sampler)


def _show_results(
    console: Console,
    root: Path,
    test: Sequence[Problem],
    sampler: SamplerConfig,
    before: float,
    after: float,
    seconds: float,
) -> None:
    run, command, length = root / RUN, _command(), sampler.max_new_tokens
    console.print(
        f"\nexact match on {len(test)} held-out problems, which neither training nor its end has seen: "
        f"{before:.1%} before training, {after:.1%} after\n"
        f"loss curve: {run / 'loss.png'}\nfrom start to end: {seconds:.0f} s\n\nNext:\n"
        f'  {command} generate --checkpoint {run} --prompt "{test[2].question}" --max_new_tokens {length}\n'
        f"  {command} train -c {root / CONFIG} --dry-run\n"
        f"  {command} export --checkpoint {run} --output {root / 'model'}",
        markup=False,
        soft_wrap=True,
    )
    if after < PROMISED:
        console.print(f"\nless than the promised {PROMISED:.0%}; please report this with {run / 'metrics.jsonl'}")


def _command() -> str:
    """Return how this program was called, so that the commands shown work as they stand."""
    name = Path(sys.argv[0]).name
    return sys.argv[0] if name == "unmask" else f"{Path(sys.executable).name} -m unmask"


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, `… a+b = <<a+b=c>>c …` and the result after `####`.

    `key` is (operand, operator, operand): what held-out problems have to themselves.
    """

    key: tuple[int, str, int]
    question: str
    answer: str

    def row(self) -> dict[str, Any]:
        """Return the problem as a chat row."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


def make_problems(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return training problems, whose keys repeat in other stories, and held-out ones, each with a key of its own."""
    random = generator(seed, "quickstart/problems")
    keys = [(a, operator, b) for a in FIRST for operator in _STORIES for b in SECOND]
    order = random.permutation(len(keys))
    held, rest = [keys[i] for i in order[:held_out]], [keys[i] for i in order[held_out:]]
    return (
        [_tell(rest[int(i)], random) for i in random.integers(len(rest), size=train)],
        [_tell(key, random) for key in held],
    )


def _tell(key: tuple[int, str, int], random: np.random.Generator) -> Problem:
    a, operator, b = key
    question = _pick(_STORIES[operator], random)
    words = {"n": _pick(_NAMES, random), "t": _pick(_THINGS, random), "a": a, "b": b}
    result = a + b if operator == "+" else a - b
    sum_ = f"{a}{operator}{b}"
    return Problem(key, question.format(**words), f"{sum_} = <<{sum_}={result}>>{result} {words['t']}\n#### {result}")


def _pick(choices: Sequence[Any], random: np.random.Generator) -> Any:
    return choices[int(random.integers(len(choices)))]
