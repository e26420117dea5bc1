"""Validation by noise level: the mean over the scored tokens of each fifth of the levels, whatever divides the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unmask.config import config_from_mapping
from unmask.data.batches import validation_set
from unmask.data.encode import RowEncoder
from unmask.distributed.ranks import Ranks
from unmask.distributed.runtime import Runtime
from unmask.evaluation.validation import FixedBatch, fixed_noise, validation_losses
from unmask.models.diffusion_gemma.family import parse_config as parse_gemma
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.loading import build_model
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.parts import build_parts
from unmask.prepare import prepare
from unmask.report.trackers import numbers
from unmask.rng import NoiseStream

RUNTIME = Runtime(torch.device("cpu"), None)


@pytest.fixture(scope="module")
def prepared(tiny):
    return prepare(config_from_mapping(tiny.config(Path("unused"), validation_dataset=tiny.validation())))


@pytest.fixture(scope="module")
def model(prepared):
    return build_model(prepared.plan, "float32", seed=3)


@pytest.fixture(scope="module")
def batches(prepared) -> Callable[[int], list]:
    def make(local_batch_size: int) -> list:
        rows, template = prepared.validation_rows, build_parts(prepared).template
        encode = RowEncoder(rows, template, prepared.config.validation_dataset)
        options = {"pad_token_id": 257, "supervise_padding": False}
        return list(validation_set(rows, encode, local_batch_size=local_batch_size, **options).batches)

    return make


def buckets(pairs: list[tuple[float, float]]) -> list[float | None]:
    """Mean of the values whose level lies in each fifth, written out."""
    found: list[list[float]] = [[] for _ in range(5)]
    for level, value in pairs:
        found[min(4, int(level * 5))].append(value)
    return [sum(values) / len(values) if values else None for values in found]


def dense(model: Any, objective: MDLM, noisy: list[FixedBatch], stream_batches: list) -> list[tuple[float, float]]:
    """(level, cross-entropy) of every masked position, from all logits, the levels drawn again."""
    pairs = []
    for part, batch in zip(noisy, stream_batches, strict=True):
        time_B = NoiseStream(42, "validation").uniform("time", batch.epoch, batch.sample_ids_B, 1)[:, 0]
        level_B = (1 - objective.eps) * (batch.slots_B + time_B) / batch.global_rows + objective.eps
        values: Any = part.noisy
        with torch.no_grad():
            logits_BLV = model.logits(model(values.noisy_ids_BL, values.attention_mask_BL))
        losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.input_ids_BL, reduction="none")
        for row, column in (values.noisy_ids_BL == objective.mask_token_id).nonzero().tolist():
            pairs.append((float(level_B[row]), float(losses_BL[row, column])))
    return pairs


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_each_fifth_is_the_plain_mean_of_its_masked_tokens(model, batches, normalization: str) -> None:
    objective = MDLM(261, normalization=normalization, time_sampling="stratified")
    noisy = fixed_noise(objective, batches(2), 42)
    found = validation_losses(model, objective, noisy, RUNTIME)["loss_by_noise_level"]
    expected = buckets(dense(model, objective, noisy, batches(2)))
    assert [value is None for value in found] == [value is None for value in expected]
    assert [value for value in found if value] == pytest.approx([value for value in expected if value], rel=1e-4)


def test_the_mean_is_that_of_the_training_loss(model, batches) -> None:
    objective = MDLM(261, normalization="sequence", time_sampling="stratified")
    noisy = fixed_noise(objective, batches(2), 42)
    with torch.no_grad():
        terms: list[Any] = [objective.loss(model.eval(), part.noisy).terms["mdlm"] for part in noisy]
    expected = float(sum(term.sum for term in terms)) / sum(term.count for term in terms)
    assert validation_losses(model, objective, noisy, RUNTIME)["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_fifth_without_tokens_is_null_and_not_zero(model, batches) -> None:
    objective = MDLM(261, eps=0.9)  # every level above 0.9
    found = validation_losses(model, objective, fixed_noise(objective, batches(6), 42), RUNTIME)["loss_by_noise_level"]
    assert found[:4] == [None] * 4 and found[4] > 0
    event = {"event": "validation", "step": 3, "loss_by_noise_level": found}
    assert numbers(event) == {"validation/loss_by_noise_level/5": found[4]}


class TwoRanks(Ranks):
    """Rank 1, told what rank 0 had."""

    def sum(self, values: Any) -> list[float]:
        return [mine + theirs for mine, theirs in zip(values, TwoRanks.others, strict=True)]

    others: list[float] = []


def test_ranks_sum_their_buckets_and_divide_once(model, batches, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, rows = MDLM(261, time_sampling="stratified"), batches(2)[:3]
    alone = validation_losses(model, objective, fixed_noise(objective, rows, 42), RUNTIME)
    kept: list[list[float]] = []
    monkeypatch.setattr(Ranks, "sum", lambda _, values: kept.append(list(values)) or list(values))
    validation_losses(model, objective, fixed_noise(objective, rows, 42, Ranks(0, 2)), RUNTIME)
    TwoRanks.others = kept[0]
    shares = fixed_noise(objective, rows, 42, Ranks(1, 2))
    assert [part.counted for part in shares] == [True, False]  # the second keeps step alone
    together = validation_losses(model, objective, shares, Runtime(torch.device("cpu"), None, TwoRanks(1, 2)))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for ours, theirs in zip(together["loss_by_noise_level"], alone["loss_by_noise_level"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_block_diffusion_counts_every_position_of_a_canvas(gemma_values: Callable[..., dict], batches) -> None:
    import dataclasses

    torch.manual_seed(0)
    model = DiffusionGemma(parse_gemma(gemma_values(canvas_length=8), "config.json")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    objective = CanvasDiffusion(8, 40, 1, time_sampling="stratified")
    rows = [dataclasses.replace(batch, input_ids_BL=batch.input_ids_BL % 36) for batch in batches(2)]
    noisy: list[Any] = fixed_noise(objective, rows, 42)
    found = validation_losses(model, objective, noisy, RUNTIME)
    pairs, sums, counts = [], {"diffusion": 0.0, "encoder": 0.0}, {"diffusion": 0.0, "encoder": 0.0}
    for part in noisy:
        with torch.no_grad():
            terms = objective.loss(model, part.noisy).terms
            scored: Any = objective.token_losses(model, part.noisy)["diffusion"]
        for name, term in terms.items():
            sums[name] += float(term.sum)
            counts[name] += term.count
        levels_KC = part.noisy.levels_K[:, None].expand(part.noisy.scored_KC.shape)
        there = part.noisy.scored_KC.flatten()
        pairs += zip(levels_KC.flatten()[there].tolist(), scored.cross_entropy_N[there].tolist(), strict=True)
        assert float(scored.cross_entropy_N[there].sum()) == pytest.approx(float(terms["diffusion"].sum), rel=1e-5)
    for name in sums:
        assert found[f"{name}_loss"] == pytest.approx(sums[name] / counts[name], rel=1e-5)
    assert found["loss"] == pytest.approx(found["diffusion_loss"] + found["encoder_loss"])
    expected = buckets(pairs)
    assert None in expected or len(set(expected)) == 5
    assert [value or 0 for value in found["loss_by_noise_level"]] == pytest.approx([v or 0 for v in expected], rel=1e-5)


def test_a_run_records_it_and_says_the_mean_alone(tiny, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    run = train_tiny(tiny.config(tmp_path, validation_dataset=tiny.validation(), step_scheduler__max_steps=1))
    event = next(event for event in run.events if event["event"] == "validation")
    assert len(event["loss_by_noise_level"]) == 5 and any(event["loss_by_noise_level"])
    line = next(line for line in run.output.splitlines() if "validation  loss" in line)
    assert line == f"step 1  validation  loss {event['loss']:.4f}  mdlm_loss {event['mdlm_loss']:.4f}"
