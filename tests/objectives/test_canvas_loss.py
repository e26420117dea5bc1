"""The losses against NeMo AutoModel's step and transformers' class a canvas at a time, and what must never be run."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.batch import Batch, CanvasBatch
from unmask.distributed.runtime import Runtime
from unmask.models.diffusion_gemma import model as network
from unmask.models.diffusion_gemma.family import parse_config
from unmask.models.diffusion_gemma.model import DiffusionGemma
from unmask.models.loading import load_model
from unmask.objectives import terms
from unmask.objectives.canvas import CanvasDiffusion, filled_rows, find_answers
from unmask.ops import chunks
from unmask.rng import NoiseStream
from unmask.training.step import train_step

Turns = Callable[..., Batch]
SIZE, VOCABULARY, EOS = 8, 40, 1
OBJECTIVE = CanvasDiffusion(SIZE, VOCABULARY, EOS)
ROWS = [
    [(3, False), (19, True)],
    [(6, False), (5, True), (3, False), (12, True), (2, False), (3, True)],
    [(2, False), (10, True), (4, False)],
]


@pytest.fixture(autouse=True)
def exact_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as long as they are; that rounding their length up changes no number has a test of its own."""
    monkeypatch.setattr("unmask.config.data.LENGTH_MULTIPLE", 1)


@pytest.fixture(scope="module")
def theirs(gemma_reference: Callable[..., Any]) -> Any:
    return gemma_reference()


@pytest.fixture
def ours(theirs: Any) -> DiffusionGemma:
    model = DiffusionGemma(parse_config(theirs.config.to_dict(), "config.json"))
    state = theirs.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model


def gradients(model: torch.nn.Module, loss: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where it took no part; `names` where a tied one has several."""
    parameters = {name: model.get_parameter(name) for name in names or dict(model.named_parameters())}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in pairs}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, grad in ours.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(grad, theirs[name], atol=1e-4 * scale + 1e-9, rtol=1e-3, msg=name)


def scored(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def reference_terms(theirs: Any, objective: CanvasDiffusion, noisy: CanvasBatch) -> dict[str, Tensor]:
    """Summed losses of transformers' class: each canvas and each row run alone, logits whole, no padding anywhere."""
    rows = range(len(noisy.starts)) if noisy.rows_K is None else noisy.rows_K.tolist()
    conditioned = {}
    if noisy.conditioned_S is not None and noisy.conditioned_weight_S is not None:
        conditioned = dict(zip(noisy.conditioned_S.tolist(), noisy.conditioned_weight_S.tolist(), strict=True))
    sums = {"diffusion": torch.zeros(()), "encoder": torch.zeros(())}
    for k, (row, start) in enumerate(zip(rows, noisy.starts, strict=True)):
        there = noisy.scored_KC[k]
        canvas, prefix = noisy.canvas_ids_KC[k][there][None], noisy.encoder_ids_BL[row, :start][None]
        given: dict[str, Any] = {"input_ids": prefix}
        if objective.stop_gradient_to_encoder:
            with torch.no_grad():
                given = {"past_key_values": theirs.model.encoder(input_ids=prefix).past_key_values}
        if conditioned.get(k):
            with torch.no_grad():
                given["self_conditioning_logits"] = theirs(input_ids=prefix, decoder_input_ids=canvas).logits
        logits = theirs(decoder_input_ids=canvas, **given).logits[0]
        sums["diffusion"] = sums["diffusion"] + scored(logits, noisy.targets_KC[k][there])
    width = noisy.encoder_ids_BL.shape[1]
    for row, ids in enumerate(noisy.encoder_ids_BL):
        length = int((noisy.encoder_positions_N // width == row).sum()) + 1
        logits = encoder_logits(theirs, theirs.model.encoder(input_ids=ids[None, :length]).last_hidden_state[0])
        sums["encoder"] = sums["encoder"] + scored(logits[:-1], ids[1:length])
    return sums


def encoder_logits(theirs: Any, hidden: Tensor) -> Tensor:
    cap = theirs.final_logit_softcapping
    return cap * torch.tanh(theirs.lm_head(hidden) / cap)


@pytest.mark.parametrize(
    "options",
    [
        {"self_conditioning_p": 0.0},
        {"self_conditioning_p": 1.0},
        {"self_conditioning_p": 0.5},
        {"self_conditioning_p": 0.5, "stop_gradient_to_encoder": True},
        {"self_conditioning_p": 0.0, "encoder_loss_weight": 0.25},
    ],
    ids=str,
)
def test_equals_transformers_a_canvas_at_a_time(options: dict, ours: DiffusionGemma, theirs: Any, turns: Turns) -> None:
    """Several answers a row, fills, a row that was cut and one that a user ends: as if each canvas were run alone."""
    objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, **options)
    for epoch in (0, 2) if len(options) == 1 and objective.self_conditioning_p == 0.5 else (2,):
        noisy = objective.corrupt(turns(ROWS, cut=[True, False, False], epoch=epoch, width=35), NoiseStream(4))
        assert len(noisy.starts) == 5
        loss = objective.loss(ours, noisy)
        sums = reference_terms(theirs, objective, noisy)
        assert {name: term.count for name, term in loss.terms.items()} == noisy.counts
        for name, term in loss.terms.items():
            assert term.weight == (options.get("encoder_loss_weight", 1.0) if name == "encoder" else 1.0)
            torch.testing.assert_close(term.sum, sums[name], atol=1e-3, rtol=2e-5)
        weights = {"diffusion": 1.0, "encoder": objective.encoder_loss_weight}
        expected = torch.stack([weights[name] * sums[name] / noisy.counts[name] for name in sums]).sum()
        torch.testing.assert_close(loss.total, expected, atol=1e-5, rtol=2e-5)
        grads = gradients(ours, loss.total)
        assert_same_gradients(grads, gradients(theirs, expected, grads))


def test_one_scored_canvas_equals_decoding_the_whole_response(ours: DiffusionGemma, theirs: Any, turns: Turns) -> None:
    """transformers' decoder over all canvases of the answer at once, each blind to the others: the same gradients."""
    from transformers import DynamicCache

    prompt, blocks = 3, 4
    objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, self_conditioning_p=0.0)
    batch = turns([[(prompt, False), (blocks * SIZE - 3, True)]])
    window = theirs.config.text_config.sliding_window
    chosen = set()
    for epoch in range(12):
        noisy = objective.corrupt(dataclasses.replace(batch, epoch=epoch), NoiseStream(1))
        block = (noisy.starts[0] - prompt) // SIZE
        if block in chosen:
            continue
        chosen.add(block)
        response = torch.randint(0, VOCABULARY, (blocks, SIZE), generator=torch.Generator().manual_seed(epoch))
        response[block] = noisy.canvas_ids_KC[0]
        # Without a configuration the cache keeps the columns that the sliding layers of later canvases do not see.
        cache = DynamicCache()
        hidden = theirs.model.encoder(input_ids=noisy.encoder_ids_BL, past_key_values=cache).last_hidden_state[0]
        length = noisy.encoder_ids_BL.shape[1]
        owner = torch.arange(blocks).repeat_interleave(SIZE)
        distance = (prompt + owner * SIZE)[:, None] - torch.arange(length)
        together = owner[:, None] == owner
        masks = {
            kind: torch.cat(((distance > 0) & (distance < reach), together), dim=1)[None, None]
            for kind, reach in (("full_attention", length + 1), ("sliding_attention", window))
        }
        decoded = theirs.model.decoder(
            decoder_input_ids=response.view(1, -1),
            past_key_values=cache,
            decoder_attention_mask=masks,
            decoder_position_ids=torch.arange(prompt, prompt + blocks * SIZE)[None],
        ).last_hidden_state[0]
        logits = encoder_logits(theirs, decoded).view(blocks, SIZE, -1)[block]
        ids = noisy.encoder_ids_BL[0]
        expected = scored(logits, noisy.targets_KC[0]) / SIZE
        expected = expected + scored(encoder_logits(theirs, hidden)[:-1], ids[1:]) / (length - 1)
        loss = objective.loss(ours, noisy).total
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=2e-5)
        grads = gradients(ours, loss)
        assert_same_gradients(grads, gradients(theirs, expected, grads))
    assert chosen == {0, 1, 2, 3}


def test_several_answers_of_a_row_are_as_each_turn_alone(ours: DiffusionGemma, turns: Turns) -> None:
    """One encoder pass serves them all, and what follows an answer never reaches it."""
    objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, encoder_loss_weight=0.0)
    batch = turns([ROWS[1]])
    noisy = objective.corrupt(batch, NoiseStream(4))
    together = objective.loss(ours, noisy).terms["diffusion"].sum
    alone = []
    for k, end in enumerate((11, 26, 31)):
        one = dataclasses.replace(
            batch,
            input_ids_BL=batch.input_ids_BL[:, :end],
            attention_mask_BL=batch.attention_mask_BL[:, :end],
            supervised_BL=batch.supervised_BL[:, :end] & (torch.arange(end) >= noisy.starts[k] // 1000),
        )
        ids, attended = filled_rows(one, find_answers(one), SIZE, EOS)
        row, start = torch.tensor([0]), torch.tensor([noisy.starts[k]])
        canvas, targets = noisy.canvas_ids_KC[k : k + 1], noisy.targets_KC[k : k + 1]
        conditioned = torch.tensor([noisy.conditioned_S is not None and k in noisy.conditioned_S.tolist()])
        part = objective.noisy(
            one, ids, attended, row, start, canvas, targets, noisy.scored_KC[k : k + 1], noisy.levels_K[k : k + 1],
            conditioned, bool(conditioned),
        )  # fmt: skip
        alone.append(objective.loss(ours, part).terms["diffusion"].sum)
    torch.testing.assert_close(together, torch.stack(alone).sum(), atol=1e-4, rtol=1e-5)


class Calls:
    """A network whose calls are recorded: canvases of each decode, and whether it had gradients and a signal."""

    def __init__(self, model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: list[tuple[int, bool, bool]] = []
        self.encoded = 0
        decode, encode = model.decode, model.encode

        def count_decode(canvas_ids: Tensor, encoded: Any, self_conditioning: Tensor | None = None, **options: Any):
            self.decoded.append((len(canvas_ids), torch.is_grad_enabled(), self_conditioning is not None))
            return decode(canvas_ids, encoded, self_conditioning, **options)

        def count_encode(*args: Any, **options: Any):
            self.encoded += 1
            return encode(*args, **options)

        monkeypatch.setattr(model, "decode", count_decode)
        monkeypatch.setattr(model, "encode", count_encode)


def test_rounding_the_length_of_rows_changes_no_number(ours, turns, monkeypatch) -> None:
    results = []
    for multiple in (1, 16):
        monkeypatch.setattr("unmask.config.data.LENGTH_MULTIPLE", multiple)
        noisy = OBJECTIVE.corrupt(turns(ROWS), NoiseStream(0))
        loss = OBJECTIVE.loss(ours, noisy).total
        results.append((noisy.encoder_ids_BL.shape[1], loss.detach(), gradients(ours, loss)))
    assert results[0][0] % 16 and results[1][0] % 16 == 0
    torch.testing.assert_close(results[1][1], results[0][1])
    assert_same_gradients(results[1][2], results[0][2])


def test_the_first_pass_runs_for_those_who_use_it_and_for_nobody_else(ours, turns, monkeypatch) -> None:
    calls, seen = Calls(ours, monkeypatch), set()
    for epoch in range(20):
        noisy = OBJECTIVE.corrupt(turns(ROWS[:2], epoch=epoch), NoiseStream(0))
        calls.decoded.clear()
        calls.encoded = 0
        OBJECTIVE.loss(ours, noisy)
        conditioned = 0 if noisy.conditioned_S is None else len(noisy.conditioned_S)
        first = [(conditioned, False, False)] if conditioned else []
        assert calls.decoded == [*first, (4, True, True)] and calls.encoded == 1
        seen.add(conditioned)
    assert seen == {0, 1, 3, 4}


def test_a_first_pass_for_the_sake_of_other_ranks_changes_nothing(ours, turns, monkeypatch) -> None:
    """The network does what the other ranks' do, and drops what comes of it."""

    def has_coin(sample: int) -> bool:
        return OBJECTIVE.corrupt(turns(ROWS[:1], samples=[sample]), NoiseStream(0)).conditioned_S is not None

    conditioned, plain = (next(n for n in range(99) if has_coin(n) == wanted) for wanted in (True, False))
    calls, results = Calls(ours, monkeypatch), []
    for peers in ([plain], [plain, conditioned]):
        noisy = OBJECTIVE.corrupt(turns(ROWS[:2], samples=[plain] * 2, peers=peers), NoiseStream(0))
        loss = OBJECTIVE.loss(ours, noisy).total
        results.append((loss.detach(), gradients(ours, loss)))
    assert calls.decoded == [(4, True, True), (1, False, False), (4, True, True)]
    (one, grads), (other, others) = results
    torch.testing.assert_close(one, other)
    assert_same_gradients(others, grads)
    assert not any(grad.any() for name, grad in others.items() if "self_conditioning" in name)


def test_the_pass_without_gradients_is_never_the_first(ours, turns, monkeypatch) -> None:
    """Where autocast keeps casts that were made without gradients, the weights would have none in later passes."""
    passes: list[tuple[str, bool]] = []

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(ours, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            passes.append((name, torch.is_grad_enabled()))
            return method(*arguments, **options)

        return noted

    for name in ("encode", "decode"):
        monkeypatch.setattr(ours, name, noting(name))
    objective = dataclasses.replace(OBJECTIVE, self_conditioning_p=1.0)
    objective.loss(ours, objective.corrupt(turns(ROWS), NoiseStream(0)))
    assert passes == [("encode", True), ("decode", False), ("decode", True)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_learns_under_autocast_as_without(ours: DiffusionGemma, turns: Turns, checkpointing: bool) -> None:
    """Autocast keeps casts: those that the pass without gradients made first would cut the weights off."""
    ours.stack.activation_checkpointing = checkpointing
    objective = dataclasses.replace(OBJECTIVE, self_conditioning_p=1.0)
    noisy = objective.corrupt(turns(ROWS), NoiseStream(0))
    exact = gradients(ours, objective.loss(ours, noisy).total)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(ours, noisy).total
    found = gradients(ours, loss)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert float(found[name].norm()) > 0.5 * float(gradient.norm()), name


def test_the_denoising_loss_stops_at_the_encoder_where_asked(ours, turns, monkeypatch) -> None:
    """No gradient reaches keys and values; the encoder's own loss trains it as before."""
    encode, kept = ours.encode, []
    monkeypatch.setattr(ours, "encode", lambda *args, **options: kept.append(encode(*args, **options)) or kept[-1])
    for stopped in (False, True):
        for weight in (0.0, 1.0):
            objective = CanvasDiffusion(
                SIZE, VOCABULARY, EOS, encoder_loss_weight=weight, stop_gradient_to_encoder=stopped
            )
            loss = objective.loss(ours, objective.corrupt(turns(ROWS), NoiseStream(0))).total
            seen = [kept[-1].hidden_BLD, *kept[-1].keys, *kept[-1].values]
            last, *past = torch.autograd.grad(loss, seen, allow_unused=True)
            assert (last is not None and bool(last.any())) == (weight > 0)
            if not weight:  # the encoder's own loss passes through its keys and values as well
                assert all(grad is None if stopped else bool(grad.any()) for grad in past)


def test_without_an_encoder_loss_its_logits_are_not_computed(ours, turns, monkeypatch) -> None:
    rows, plain = [], terms.linear_cross_entropy

    def counting(hidden_ND: Tensor, *args: Any, **options: Any) -> Any:
        rows.append(len(hidden_ND))
        return plain(hidden_ND, *args, **options)

    monkeypatch.setattr(terms, "linear_cross_entropy", counting)
    batch = turns(ROWS)
    for weight, expected in ((0.0, [40]), (1.0, [40 + 26 + 35 + 15])):
        objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, encoder_loss_weight=weight)
        objective.loss(ours, objective.corrupt(batch, NoiseStream(0)))
        assert rows == expected
        rows.clear()


class Floats(TorchDispatchMode):
    """Records the largest tensor of floats that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.numel = max(self.numel, value.numel())
        return result


def test_logits_and_signals_never_exist_whole(gemma_values, turns, monkeypatch) -> None:
    """Encoder, canvases and self-conditioning: no tensor of positions × vocabulary, and the same numbers."""
    vocabulary, size = 2000, 32
    model = DiffusionGemma(parse_config(gemma_values(canvas_length=size, vocab_size=vocabulary), "config.json"))
    network.initialise(model, torch.Generator().manual_seed(0))
    objective = CanvasDiffusion(size, vocabulary, EOS, self_conditioning_p=1.0)
    noisy = objective.corrupt(turns([[(5, False), (70, True)]] * 2), NoiseStream(0))
    results, largest = [], []
    loss_of = terms.linear_cross_entropy
    for chunk, columns in ((2**24, 2**12), (8 * vocabulary, 300)):
        monkeypatch.setattr(chunks, "CAST_ROWS", columns)
        monkeypatch.setattr(terms, "linear_cross_entropy", functools.partial(loss_of, chunk_logits=chunk))
        with Floats() as floats:
            loss = objective.loss(model, noisy).total
            grads = gradients(model, loss)
        results.append((loss.detach(), grads))
        largest.append(floats.numel)
    table = model.stack.embed_tokens.weight.numel()
    assert largest[1] == table < 2 * size * vocabulary <= largest[0]
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-4)


def reference_step(folder: Path) -> list[CanvasBatch]:
    """The reference micro-batches with the windows, noise and coins that were drawn."""
    step = load_file(folder / "step.safetensors")
    objective = CanvasDiffusion(256, 4096, EOS)
    parts = []
    for n in range(2):
        rows, window = (
            {key.split(".")[1]: value for key, value in step.items() if key.startswith(f"{kind}{n}.")}
            for kind in ("batch", "window")
        )
        there = torch.arange(rows["input_ids"].shape[1])[None] < rows["input_lengths"][:, None]
        supervised = rows["loss_mask"].bool() & there
        number, cut = torch.tensor([n]), torch.tensor([False])
        lengths = supervised.sum(1)
        batch = Batch(rows["input_ids"], supervised, there, lengths, number, 0, number, 2, cut, number)
        answers = find_answers(batch)
        ids, attended = filled_rows(batch, answers, 256, EOS)
        # Our fill is theirs: the same tokens, read to the same end.
        assert torch.equal(attended, ~window["encoder_padding_mask"])
        assert torch.equal(ids[attended], rows["input_ids"][attended])
        start = window["decoder_position_ids"][:, 0]
        assert int(start - answers.starts_T) % 256 == 0 and int(start) < int(answers.ends_T)
        coin = step[f"self_conditioning{n}"]
        parts.append(
            objective.noisy(
                batch, ids, attended, torch.tensor([0]), start, window["canvas_ids"], window["target_ids"],
                window["loss_mask"], torch.ones(1), coin, bool(coin),
            )
        )  # fmt: skip
    return parts


def test_the_step_equals_automodels(fixtures: Path) -> None:
    """Accumulated over its micro-batches, each term divided once by its global count, the router frozen."""
    folder = fixtures / "diffusion_gemma_step"
    expected = json.loads((folder / "expected.json").read_text())
    model, parts = load_model(str(folder)), reference_step(folder)
    assert any(part.conditioned_S is not None for part in parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(("router.proj.weight", "router.scale")))
    counts = {name: sum(part.counts[name] for part in parts) for name in ("diffusion", "encoder")}
    found = dict.fromkeys(counts, 0.0)
    for part in parts:
        loss = CanvasDiffusion(256, 4096, EOS).loss(model, part, counts)
        loss.total.backward()
        for name, term in loss.terms.items():
            found[name] += term.sum.item() / counts[name]
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    found["norm"] = float(torch.stack(norms).norm())
    assert found["diffusion"] == pytest.approx(expected["diffusion_loss"], rel=1e-6)
    assert found["encoder"] == pytest.approx(expected["encoder_loss"], rel=1e-4)
    assert found["diffusion"] + found["encoder"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_step_over_unequal_micro_batches_divides_once(ours: DiffusionGemma, theirs: Any, turns: Turns) -> None:
    """Loss and gradient norm of the engine's step, against transformers' summed losses over the global counts."""
    objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, encoder_loss_weight=0.25, self_conditioning_p=0.0)
    batches, noise = [turns(ROWS[:1]), turns(ROWS[1:], samples=[1, 2])], NoiseStream(4)
    parts = [objective.corrupt(batch, noise) for batch in batches]
    assert parts[0].counts["diffusion"] != parts[1].counts["diffusion"]
    counts = {name: sum(part.counts[name] for part in parts) for name in ("diffusion", "encoder")}
    sums = [reference_terms(theirs, objective, part) for part in parts]
    weights = {"diffusion": 1.0, "encoder": 0.25}
    expected = torch.stack([weights[name] * one[name] / counts[name] for one in sums for name in counts]).sum()
    names = dict(ours.named_parameters())
    norm = torch.stack([grad.norm() for grad in gradients(theirs, expected, names).values()]).norm()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    result = train_step(ours, objective, batches, noise, optimizer, Runtime(torch.device("cpu"), None), None)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_the_encoders_loss_of_the_step_is_transformers(fixtures: Path) -> None:
    """To rounding; AutoModel's is 1.7e-5 of it away."""
    from transformers import DiffusionGemmaForBlockDiffusion

    folder = fixtures / "diffusion_gemma_step"
    ours, parts = load_model(str(folder)), reference_step(folder)
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()
    objective, expected, found = CanvasDiffusion(256, 4096, EOS), 0.0, 0.0
    with torch.no_grad():
        for part in parts:
            found += float(objective.loss(ours, part).terms["encoder"].sum)
            ids = part.encoder_ids_BL[:, : int(part.counts["encoder"]) + 1]
            logits = encoder_logits(theirs, theirs.model.encoder(input_ids=ids).last_hidden_state[0])
            expected += float(scored(logits[:-1].double(), ids[0, 1:]))
    count = sum(part.counts["encoder"] for part in parts)
    assert found / count == pytest.approx(expected / count, rel=1e-6)
    assert expected / count == pytest.approx(8.264628, abs=1e-6)  # what docs/diffusion-gemma.md says


def test_steps_lower_both_losses_of_a_real_network(ours: DiffusionGemma, turns: Turns) -> None:
    noisy = OBJECTIVE.corrupt(turns(ROWS), NoiseStream(0))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = OBJECTIVE.loss(ours, noisy)
        losses.append({name: term.sum.item() / term.count for name, term in loss.terms.items()})
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert all(losses[-1][name] < losses[0][name] - 0.1 for name in ("diffusion", "encoder"))
