"""Speed beside correctness: a LLaDA trained here as the quickstart trains it solves held-out problems by each sampler.

Model, data and training are the quickstart's own; only the samplers differ. An answer is right when its whole text is.
Exact match is measured over all test problems with the network as it was trained, whose vocabulary has 384 rows; speed
over a few of them, with the same network's vocabulary widened to LLaDA's 126,464 rows. The bias of those rows forbids
them, so no answer changes, and logits cost what LLaDA's cost.

The network is surer of its answers than a language model is of free text: it commits nearly a block a call. So the
speed-up is that of an easy task, and the tokens a call say how much of it comes from fewer calls.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds import at_least, at_most

NEW, BLOCK = 24, 8  # tokens of an answer, as in the quickstart, and of a block
TIMED = 6  # problems to time; all test problems are graded
WIDE = 126_464
# Bias of rows that no answer has: they are never the likeliest, and exp of it is a normal number, with which a CPU
# computes as fast as with others.
FORBIDS = -60.0
SAMPLERS: dict[str, dict[str, Any]] = {
    "exact": {"steps": NEW},
    "dual": {"steps": NEW, "cache": "dual"},
    "dual, threshold 0.9": {"cache": "dual", "threshold": 0.9},
    "preset reference": {"preset": "reference", "steps": NEW},
    "preset balanced": {"preset": "balanced"},
    "preset fast": {"preset": "fast"},
}
# The bound that the project promises: speed of this sampler over the published one's, and points of exact match lost.
BOUND = ("dual, threshold 0.9", 12.0, 0.01)


def train(root: Path, seed: int = 42) -> tuple[Any, Any, list[Any], float]:
    """Train as the quickstart does; return the model, its tokenizer, its test problems and the seconds.

    Training ends when the validation problems are solved, or after the quickstart's number of steps.
    """
    from unmask.quickstart import configuration, learned

    return train_on_problems(root, configuration(root, seed), learned())


def train_on_problems(
    root: Path,
    values: dict[str, Any],
    is_good_enough: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> tuple[Any, Any, list[Any], float]:
    """Train on the quickstart's problems; return the model, its tokenizer, the test problems and the seconds.

    Args:
        root: folder for everything.
        values: the configuration, whose seed the problems go by, too.
        is_good_enough: whether training may end, from what a validation measured.
    """
    from rich.console import Console

    from unmask.assemble import run_training
    from unmask.config import load_config
    from unmask.models.loading import load_model
    from unmask.models.tokenizer import load_tokenizer
    from unmask.prepare import prepare
    from unmask.quickstart import CONFIG, RUN, TEST_ROWS, TRAIN_ROWS, VALIDATION_ROWS, make_problems, write_run

    began = time.monotonic()
    problems, held_out = make_problems(TRAIN_ROWS, VALIDATION_ROWS + TEST_ROWS, values["seed"])
    write_run(root, problems, held_out[:VALIDATION_ROWS], values)
    run_training(prepare(load_config(root / CONFIG)), Console(highlight=False), is_good_enough=is_good_enough)
    model, tokenizer = load_model(str(root / RUN)), load_tokenizer(str(root / RUN))
    return model.eval(), tokenizer, held_out[VALIDATION_ROWS:], time.monotonic() - began


def solve(model: Any, tokenizer: Any, problems: Sequence[Any], settings: dict[str, Any]) -> tuple[float, list[Any]]:
    """Return the share of problems whose whole answer is right, and the answers."""
    from unmask.config.sampler import SamplerConfig
    from unmask.sampling.generate import generate

    values: dict[str, Any] = {"max_new_tokens": NEW, "block_size": BLOCK}
    sampler = SamplerConfig(**(values | settings))
    answers = generate(model, [p.question for p in problems], tokenizer=tokenizer, sampler=sampler, batch_size=16)
    return share_right([a.text or "" for a in answers], problems), answers


def solve_as_published(model: Any, tokenizer: Any, problems: Sequence[Any]) -> tuple[float, list[list[int]]]:
    """Return the same for the published algorithm, whose batches have prompts of one length, and the tokens."""
    import torch

    from benchmarks.published_sampler import published

    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    for index, ids in enumerate(prompts):
        by_length[len(ids)].append(index)
    found: dict[int, list[int]] = {}
    for indices in by_length.values():
        out, _ = published(model, torch.tensor([prompts[index] for index in indices]), NEW, BLOCK, NEW)
        found |= dict(zip(indices, out.tolist(), strict=True))
    tokens = [_until_end(tokenizer, found[index]) for index in range(len(problems))]
    return share_right([tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens], problems), tokens


def share_right(texts: Sequence[str], problems: Sequence[Any]) -> float:
    """Return the share of texts that are the whole answer."""
    return sum(text.strip() == p.answer for text, p in zip(texts, problems, strict=True)) / len(texts)


def widened(model: Any) -> Any:
    """Return the same network with a vocabulary of `WIDE` rows; the further ones have a bias that forbids them."""
    import torch

    from unmask.models.llada.model import LLaDA

    config = dataclasses.replace(model.config, vocab_size=WIDE, embedding_size=WIDE, include_bias=True)
    wide, narrow = LLaDA(config), model.state_dict()
    state = {name: narrow.get(name, torch.zeros_like(value)) for name, value in wide.state_dict().items()}
    head = "model.transformer.ff_out"
    for name, fill in (("model.transformer.wte.weight", 0.0), (f"{head}.weight", 0.0), (f"{head}.bias", FORBIDS)):
        rows = torch.full((WIDE, *state[name].shape[1:]), fill)
        rows[: model.config.rows] = narrow[name] if name in narrow else 0.0
        state[name] = rows
    wide.load_state_dict(state)
    return wide.eval()


def run(rounds: int = 3) -> dict[str, Any]:
    """Train, then measure exact match over all test problems, and speed over a few in alternating rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, test, seconds = train(Path(folder) / "quickstart")
    return measured(model, tokenizer, test, rounds) | {"training_seconds": seconds}


def measured(model: Any, tokenizer: Any, test: Sequence[Any], rounds: int) -> dict[str, Any]:
    """Return exact match and speed of every sampler with a trained network."""
    right, tokens = solve_as_published(model, tokenizer, test)
    matches = {"published": right} | {name: solve(model, tokenizer, test, s)[0] for name, s in SAMPLERS.items()}
    wide, timed = widened(model), test[:TIMED]
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in matches}
    for _ in range(rounds):
        began = time.perf_counter()
        found = [solve_as_published(wide, tokenizer, [problem])[1][0] for problem in timed]
        rates["published"].append(_rate(sum(map(len, found)), NEW * TIMED, time.perf_counter() - began))
        if found != tokens[:TIMED]:
            raise RuntimeError("the widened vocabulary changed an answer, so its speed says nothing of the network")
        for name, settings in SAMPLERS.items():
            began = time.perf_counter()
            answers = [solve(wide, tokenizer, [problem], settings)[1][0] for problem in timed]
            seconds_taken = time.perf_counter() - began
            calls = sum(answer.stats.nfe for answer in answers)
            rates[name].append(_rate(sum(len(answer.token_ids) for answer in answers), calls, seconds_taken))
    samplers = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        | {
            "exact_match": matches[name],
            "speedup": statistics.median(
                ours["tokens_per_second"] / plain["tokens_per_second"]
                for ours, plain in zip(runs, rates["published"], strict=True)
            ),
        }
        for name, runs in rates.items()
    }
    lengths, config = [len(_prompt(tokenizer, problem)) for problem in test], model.config
    sizes = {
        "d_model": config.d_model, "n_layers": config.n_layers, "new": NEW, "block": BLOCK, "vocabulary": WIDE,
        "trained_vocabulary": config.vocab_size, "prompt": [min(lengths), max(lengths)],
    }  # fmt: skip
    bound = dict(zip(("sampler", "speedup_at_least", "match_lost_at_most"), BOUND, strict=True))
    return {"sizes": sizes, "test_problems": len(test), "timed_problems": TIMED, "samplers": samplers, "bound": bound}


def table(results: dict[str, Any]) -> str:
    """Return the results as a table for people."""
    sizes, bound = results["sizes"], results["bound"]
    lines = [
        f"trained {results['training_seconds']:.0f} s with the quickstart's recipe: d={sizes['d_model']}, "
        f"{sizes['n_layers']} layers, prompt {sizes['prompt'][0]} to "
        f"{sizes['prompt'][1]}, {sizes['new']} new tokens, block {sizes['block']}; vocabulary "
        f"{sizes['trained_vocabulary']}, timed with {sizes['vocabulary']:,} rows; exact match of whole answers over "
        f"{results['test_problems']} held-out problems",
        f"{'sampler':<22}{'exact match':>12}{'tokens/s':>10}{'calls':>8}{'tokens/call':>12}{'speed-up':>10}",
    ]
    for name, found in results["samplers"].items():
        lines.append(
            f"{name:<22}{found['exact_match']:>12.1%}{found['tokens_per_second']:>10.1f}{found['calls']:>8.1f}"
            f"{found['tokens_per_call']:>12.2f}{found['speedup']:>10.2f}"
        )
    speedup = results["samplers"][bound["sampler"]]["speedup"]
    lost = results["samplers"]["published"]["exact_match"] - results["samplers"][bound["sampler"]]["exact_match"]
    lines.append(
        f"{bound['sampler']}: speed-up {speedup:.2f} ({at_least(speedup, bound['speedup_at_least'])}), exact match "
        f"lost {lost:.1%} ({at_most(lost, bound['match_lost_at_most'], percent=True)})"
    )
    return "\n".join(lines)


def _rate(tokens: int, calls: int, seconds: float) -> dict[str, float]:
    return {"tokens_per_second": tokens / seconds, "calls": calls / TIMED, "tokens_per_call": tokens / calls}


def _prompt(tokenizer: Any, problem: Any) -> list[int]:
    from unmask.sampling.prompts import encode_prompts

    return encode_prompts([problem.question], tokenizer, False, None)[0]


def _until_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the tokens before the first that ends an answer."""
    from unmask.sampling.prompts import template_of

    ends = {tokenizer.eos_token_id, *template_of(tokenizer, None).form.stop_ids}
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
