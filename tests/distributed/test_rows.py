"""Rows divided among ranks: all of them once, equal ones together, results in the order of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.distributed.inference import divide_rows, own_rows
from unmask.distributed.ranks import Ranks

ON_EVERY_DEVICE = True  # CUDA devices and NCCL under `make gpus`


def test_every_row_has_one_rank_and_equal_rows_the_same() -> None:
    rows = ["a", "b", "a", "c", "d", "b", "e"]
    owned = [own_rows(rows, Ranks(rank, 3)) for rank in range(3)]
    assert owned == [[0, 2, 4], [1, 5, 6], [3]]
    assert divide_rows(rows, Ranks(), lambda some: [row * 2 for row in some]) == [row * 2 for row in rows]


def test_results_come_back_in_order(run_ranks: Callable[..., list]) -> None:
    first, second = run_ranks(2, "divide", ["a", "b", "a", "c"])
    assert first["all"] == second["all"] == ["A", "B", "A", "C"]
    assert (first["given"], second["given"]) == (["a", "a", "c"], ["b"])
    assert run_ranks(2, "divide", ["a"])[1] == {"all": ["A"], "given": []}


PROMPTS = ("1 plus 1?", "so?", "1 plus 1?", "20 plus 6?")


def words_for(checkpoint: Path, output: Path, device: str, *more: str, texts: tuple[str, ...] = PROMPTS) -> list[str]:
    prompts = [word for text in texts for word in ("--prompt", text)]
    flags = ["--max_new_tokens", "8", "--batch_size", "1", "--device", device, "--output", str(output)]
    return ["generate", "--checkpoint", str(checkpoint), *prompts, *flags, *more]


def records(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        del record["tokens_per_second"]
    return found


@pytest.mark.parametrize("temperature", [pytest.param("0", marks=pytest.mark.slow), "1"])
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["whole", "sharded"])
def test_two_ranks_write_the_file_of_one(
    tiny_base: Path, run_ranks, tmp_path: Path, device: str, temperature: str, shard: tuple[str, ...]
) -> None:
    # Rows are one on one rank and three on the other, and with a threshold take calls as many as they need.
    flags = ["--block_size", "4", "--threshold", "0.03", "--temperature", temperature]
    assert main(words_for(tiny_base, tmp_path / "one.jsonl", device, *flags)) == 0
    assert run_ranks(2, "command", words_for(tiny_base, tmp_path / "two.jsonl", device, *flags, *shard)) == [0, 0]
    one, two = records(tmp_path / "one.jsonl"), records(tmp_path / "two.jsonl")
    assert one == two and len(one) == 4 and one[0]["prompt"] == one[2]["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["whole", "sharded"])
def test_fewer_prompts_than_ranks(tiny_base: Path, run_ranks, tmp_path: Path, device: str, shard: tuple) -> None:
    def words(name: str, *more: str) -> list[str]:
        flags = ("--block_size", "4", "--steps", "4", *more)
        return words_for(tiny_base, tmp_path / name, device, *flags, texts=PROMPTS[:1])

    assert main(words("one.jsonl")) == 0
    assert run_ranks(2, "command", words("two.jsonl", *shard)) == [0, 0]
    assert records(tmp_path / "one.jsonl") == records(tmp_path / "two.jsonl")


@pytest.mark.parametrize(("slow", "field"), [(1, "exchange_seconds"), (0, "data_seconds")])
def test_a_step_waits_for_its_own_rows_or_for_the_other_rank(
    tiny, run_ranks: Callable[..., list], tmp_path: Path, slow: int, field: str
) -> None:
    values = tiny.config(tmp_path / "run", step_scheduler__max_steps=1)
    run_ranks(2, "train_with_slow_rows", values, slow, 1.0)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (step,) = (line for line in lines if line["event"] == "train")
    assert {name for name in ("data_seconds", "exchange_seconds") if step[name] > 0.9} == {field}
