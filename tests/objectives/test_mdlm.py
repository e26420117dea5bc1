"""The objective against NeMo AutoModel's step, plain loops, and the laws of its noise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from unmask.batch import Batch, LossTerms, NoisyBatch
from unmask.models.llada.model import LLaDA
from unmask.models.loading import load_model
from unmask.objectives.mdlm import MDLM
from unmask.ops.head import Head
from unmask.rng import NoiseStream

Rows = Callable[..., Batch]
MASK = 99


class Linear:
    """A network of one matrix: hidden states are an embedding, so that losses are easy to write out."""

    def __init__(self, vocabulary: int = 100) -> None:
        generator = torch.Generator().manual_seed(4)
        self.table = torch.randn(vocabulary, 5, generator=generator)
        self.matrix = torch.randn(vocabulary, 5, generator=generator)
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        self.seen.append((ids, mask))
        return self.table[ids] + 0.1 * torch.arange(ids.shape[1])[:, None]

    @property
    def head(self) -> Head:
        return Head(self.matrix)

    def cross_entropy(self, ids: Tensor, position: int, target: int) -> float:
        hidden = self.table[ids[position]] + 0.1 * position
        return float(F.cross_entropy((self.matrix @ hidden)[None], torch.tensor([target])))


def golden_step(fixtures: Path, attend_padding: bool) -> list[NoisyBatch]:
    """The reference micro-batches with the noise that AutoModel drew."""
    step = load_file(fixtures / "mdlm_step" / "step.safetensors")
    mask_id = json.loads((fixtures / "mdlm_step" / "config.json").read_text())["mask_token_id"]
    parts = []
    for n in range(2):
        values = {key.split(".")[1]: value for key, value in step.items() if key.startswith(f"batch{n}.")}
        ids, supervised = values["input_ids"], values["loss_mask"].bool()
        attends = torch.ones_like(supervised) if attend_padding else values["attention_mask"].bool()
        numbers, cut = torch.arange(4), torch.zeros(4, dtype=torch.bool)
        clean = Batch(ids, supervised, attends, supervised.sum(1), numbers, 0, numbers, 8, cut, numbers)
        noise = values["noise_mask"]
        assert torch.equal(values["noisy_input_ids"], ids.masked_fill(noise, mask_id))
        assert not (noise & ~supervised).any()
        parts.append(MDLM(mask_id).noisy(clean, values["noisy_input_ids"], noise, values["p_mask"]))
    return parts


def step(model: LLaDA, parts: list[NoisyBatch], loss: Callable[[NoisyBatch, float], Tensor]) -> tuple[float, float]:
    """Return loss and gradient norm of micro-batches that are each divided by the global count."""
    model.zero_grad()
    count, total = sum(part.counts["mdlm"] for part in parts), 0.0
    for part in parts:
        value = loss(part, count)
        value.backward()
        total += value.item()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return total, float(torch.stack(norms).norm())


@pytest.mark.parametrize("attend_padding", [True, False])
def test_the_step_equals_automodels(attend_padding: bool, fixtures: Path) -> None:
    """Its run passed no attention mask to the network, so its numbers are those of attended padding.

    With the padding masked out, as `supervise_padding: false` does here, both numbers differ: that case is held to a
    dense recomputation instead.
    """
    expected = json.loads((fixtures / "mdlm_step" / "expected.json").read_text())
    model = load_model(str(fixtures / "mdlm_step"))
    assert isinstance(model, LLaDA)
    parts = golden_step(fixtures, attend_padding)
    assert [part.attention_mask_BL is None for part in parts] == [attend_padding] * 2

    def dense(part: NoisyBatch, count: float) -> Tensor:
        logits = model.logits(model(part.noisy_ids_BL, part.attention_mask_BL))
        losses = F.cross_entropy(logits.flatten(0, 1), part.clean.input_ids_BL.flatten(), reduction="none")
        return (losses * part.weights_BL.flatten()).sum() / count

    objective = MDLM(3)
    ours = step(model, parts, lambda part, count: objective.loss(model, part, {"mdlm": count}).total)
    assert ours == pytest.approx(step(model, parts, dense), rel=1e-5)
    golden = (expected["loss"], expected["grad_norm"])
    if attend_padding:
        assert ours == pytest.approx(golden, rel=1e-4)
    else:
        assert ours == pytest.approx((8.908127, 1.224724), rel=1e-5)
        assert abs(ours[1] / golden[1] - 1) > 1e-2


def loss_of(terms: LossTerms) -> float:
    (term,) = terms.terms.values()
    value = (term.weight * term.sum / term.count).item()
    assert terms.total.item() == pytest.approx(value, rel=1e-6)
    return value


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("supervise_padding", [False, True])
def test_the_loss_is_the_formulas(normalization: str, supervise_padding: bool, rows: Rows) -> None:
    batch = rows([3, 8, 1, 12], [9, 20, 5, 14], supervise_padding=supervise_padding)
    objective, model = MDLM(MASK, eps=0.3, normalization=normalization), Linear()
    noisy = objective.corrupt(batch, NoiseStream(5))
    terms = objective.loss(model, noisy)
    total = supervised = 0.0
    for b in range(4):
        answer = range(3, 20 if supervise_padding else [9, 20, 5, 14][b])
        ids, clean = noisy.noisy_ids_BL[b], batch.input_ids_BL[b]
        masked = [place for place in answer if ids[place] == MASK]
        # p = (1 − ε) t + ε from the row's own draw.
        p = 0.7 * float(NoiseStream(5).uniform("time", 0, batch.sample_ids_B[b : b + 1], 1)) + 0.3
        row = sum(model.cross_entropy(ids, place, int(clean[place])) / p for place in masked)
        assert int(batch.answer_lengths_B[b]) == len(answer)
        total += row / len(answer) if normalization == "sequence" else row
        supervised += len(answer)
    count = 4 if normalization == "sequence" else supervised
    assert noisy.counts == {"mdlm": count} and terms.terms["mdlm"].count == count
    assert loss_of(terms) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("supervise_padding", [False, True])
def test_what_the_network_sees(supervise_padding: bool, rows: Rows) -> None:
    batch = rows([3, 8], [9, 20], supervise_padding=supervise_padding)
    objective, model = MDLM(MASK, eps=0.9), Linear()
    noisy = objective.corrupt(batch, NoiseStream(0))
    objective.loss(model, noisy)
    ((ids, mask),) = model.seen
    assert ids is noisy.noisy_ids_BL
    # Padding that is supervised is attended, and then no mask is needed at all.
    assert (mask is None) == supervise_padding
    assert bool((ids[0, 9:] == MASK).any()) == supervise_padding
    assert (ids[:, :3] == batch.input_ids_BL[:, :3]).all()
    assert torch.equal(noisy.scored_BL, ids == MASK)
    assert torch.equal(noisy.weights_BL > 0, noisy.scored_BL)
    assert noisy.clean is batch and MASK not in batch.input_ids_BL


def test_the_given_batch_is_not_changed(rows: Rows) -> None:
    batch = rows([0, 1], [30, 30])
    before = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    copies = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    MDLM(MASK).corrupt(batch, NoiseStream(0))
    assert all(torch.equal(before[name], copy) for name, copy in copies.items())


@given(
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
    padding=st.integers(0, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
    sampling=st.sampled_from(["iid", "stratified"]),
)
def test_noise_depends_on_seed_epoch_and_sample_alone(rows: Rows, order, cut, padding, seed, epoch, sampling) -> None:
    lengths = [9, 20, 7, 15, 11, 4]
    objective, stream = MDLM(MASK, time_sampling=sampling), NoiseStream(seed)
    whole = objective.corrupt(rows(range(6), lengths, epoch=epoch), stream)
    for part in (order[:cut], order[cut:]):
        picked = [lengths[n] for n in part]
        batch = rows(part, picked, padded_to=max(picked) + padding, epoch=epoch, slots=part, global_rows=6)
        noisy = objective.corrupt(batch, stream)
        for b, n in enumerate(part):
            assert torch.equal(noisy.noisy_ids_BL[b, : lengths[n]], whole.noisy_ids_BL[n, : lengths[n]])
            assert torch.equal(noisy.weights_BL[b, : lengths[n]], whole.weights_BL[n, : lengths[n]])


def test_noise_differs_between_seeds_scopes_epochs_and_samples(rows: Rows) -> None:
    def masks(seed: int = 1, scope: str = "train", epoch: int = 0, sample: int = 4) -> tuple[bool, ...]:
        noisy = MDLM(MASK, eps=0.4).corrupt(rows([sample], [203], epoch=epoch), NoiseStream(seed, scope))
        return tuple(noisy.scored_BL[0].tolist())

    seen = {masks(), masks(seed=2), masks(seed=1 + 2**32), masks(scope="validation"), masks(epoch=1), masks(sample=5)}
    assert len(seen) == 6
    torch.manual_seed(123)
    assert masks() in seen


def test_the_first_tokens_coin_is_not_the_number_that_drew_t(rows: Rows) -> None:
    batch = rows(range(400), [20] * 400)
    batch = dataclasses.replace(batch, supervised_BL=torch.ones_like(batch.supervised_BL))
    noisy = MDLM(MASK).corrupt(batch, NoiseStream(2))
    p = 0.999 * NoiseStream(2).uniform("time", 0, batch.sample_ids_B, 1)[:, 0] + 1e-3
    for position in range(3):
        misses = noisy.scored_BL[:, position].float() - p
        assert abs(float(misses.sum())) < 4 * float((p * (1 - p)).sum().sqrt())
        assert abs(float((misses * (p - 0.5)).sum())) < 4 * float((p * (1 - p) * (p - 0.5) ** 2).sum().sqrt())


def test_tokens_are_masked_independently_at_their_rows_rate(rows: Rows) -> None:
    samples, length = range(300), 203
    noisy = MDLM(MASK).corrupt(rows(samples, [length] * 300), NoiseStream(11))
    time = NoiseStream(11).uniform("time", 0, torch.arange(300), 1)[:, 0]
    p = 0.999 * time + 1e-3
    masked = noisy.scored_BL[:, 3:].float()
    assert not noisy.scored_BL[:, :3].any()
    # Standard scores of the rows' rates: mean 0 and deviation 1 if each token is masked with its row's p.
    scores = (masked.mean(1) - p) / (p * (1 - p) / 200).sqrt()
    assert abs(float(scores.mean())) < 0.2 and 0.85 < float(scores.std()) < 1.15
    # No position is favoured, and neighbours know nothing of each other once the row's rate is taken out.
    left = masked - p[:, None]
    assert float((left.mean(0) / (p * (1 - p)).mean().sqrt() * 300**0.5).abs().max()) < 4
    correlation = (left[:, 1:] * left[:, :-1]).mean() / left.square().mean()
    assert abs(float(correlation)) < 0.015
    # t is uniform, and the coins of the masks are not the number that drew t.
    assert float((time.sort().values - (torch.arange(300) + 0.5) / 300).abs().max()) < 0.09
    coins = NoiseStream(11).uniform("mask", 0, torch.arange(300), 8)
    assert float(torch.corrcoef(torch.cat((time[None], coins.T)))[0, 1:].abs().max()) < 0.2


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_weights_are_bounded_by_one_over_eps(eps: float, rows: Rows) -> None:
    noisy = MDLM(MASK, eps=eps).corrupt(rows(range(200), [40] * 200), NoiseStream(0))
    weights = noisy.weights_BL[noisy.scored_BL]
    assert 1 - 1e-6 <= float(weights.min()) and float(weights.max()) <= 1 / eps * (1 + 1e-6)


def weighted_losses(sampling: str, rows: Rows, batches: int, size: int, ids: Tensor) -> Tensor:
    """The loss of many global batches of the same rows under a network whose error grows with what is hidden."""
    objective, losses = MDLM(MASK, eps=0.05, time_sampling=sampling), []
    for n in range(batches):
        slots = torch.randperm(size, generator=torch.Generator().manual_seed(n)).tolist()
        noisy = objective.corrupt(rows(ids.tolist(), [43] * size, epoch=n, slots=slots), NoiseStream(3))
        # Cross-entropy of a masked token: the share that is hidden, a number known without a network.
        hidden = noisy.scored_BL.float().sum(1, keepdim=True) / 40
        losses.append((noisy.weights_BL * noisy.scored_BL * hidden).sum() / noisy.counts["mdlm"])
    return torch.stack(losses)


def test_stratified_times_keep_the_expectation_and_lower_the_variance(rows: Rows) -> None:
    ids = torch.arange(8)
    iid = weighted_losses("iid", rows, 400, 8, ids)
    stratified = weighted_losses("stratified", rows, 400, 8, ids)
    # E[CE/p] with CE = k/40, k ~ Binomial(40, p): E[k²]/(40² p) = (40 p (1 − p) + (40 p)²) / (40² p).
    expected = sum((1 - p) / 40 + p for p in ((n + 0.5) / 1000 * 0.95 + 0.05 for n in range(1000))) / 1000
    for losses in (iid, stratified):
        error = float(losses.std()) / 400**0.5
        assert float(losses.mean()) == pytest.approx(expected, abs=4 * error)
    assert float(stratified.var()) < 0.3 * float(iid.var())  # what is left is the masks'


def test_every_row_still_sees_every_level(rows: Rows) -> None:
    """Slots are random places, so that one row's t is uniform over steps although each batch's are spread."""
    times = []
    for n in range(600):
        slots = torch.randperm(4, generator=torch.Generator().manual_seed(n)).tolist()
        noisy = MDLM(MASK, eps=0.5, time_sampling="stratified").corrupt(
            rows(range(4), [60] * 4, epoch=n, slots=slots), NoiseStream(0)
        )
        level = 1 / noisy.weights_BL.amax(1)
        assert all(
            -1e-3 < (value - 0.5) * 8 - slot < 1 + 1e-3 for value, slot in zip(level.tolist(), slots, strict=True)
        )
        times.append((level - 0.5) * 2)
    for row in torch.stack(times).T:
        grid = (torch.arange(600) + 0.5) / 600
        assert float((row.sort().values - grid).abs().max()) < 1.63 / 600**0.5  # Kolmogorov–Smirnov at 1 %


def test_one_step_lowers_the_loss_of_a_real_network(fixtures: Path) -> None:
    model = load_model(str(fixtures / "mdlm_step"))
    assert isinstance(model, LLaDA)
    parts = golden_step(fixtures, True)[:1]

    def loss() -> float:
        return loss_of(MDLM(3).loss(model, parts[0]))

    before = loss()
    step(model, parts, lambda part, _: MDLM(3).loss(model, part).total)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad if parameter.grad is not None else 0
        assert loss() < before
