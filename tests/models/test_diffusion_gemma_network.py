"""The network against transformers' own class, row by row without padding, and the laws of encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask.errors import ModelError
from unmask.models.diffusion_gemma.family import parse_config
from unmask.models.diffusion_gemma.model import PADDING_POSITION, DiffusionGemma, Encoded, initialise
from unmask.models.experts import local_dispatch

Reference = Callable[..., Any]
CANVAS, VOCABULARY, WIDTH = 8, 40, 16
CLOSE = {"atol": 2e-5, "rtol": 2e-4}


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(theirs: Any) -> DiffusionGemma:
    """Our network with the weights of transformers'."""
    ours = DiffusionGemma(parse_config(theirs.config.to_dict(), "config.json"))
    state = theirs.state_dict()
    ours.load_state_dict({key: state[key] for key in ours.state_dict()})
    return ours.to(theirs.dtype).eval()


@pytest.fixture(scope="module")
def network(gemma_reference: Reference) -> Callable[..., DiffusionGemma]:
    return lambda **fields: same(gemma_reference(**fields))


@pytest.fixture(scope="module")
def model(network: Callable[..., DiffusionGemma]) -> DiffusionGemma:
    return network()


def alone(theirs: Any, tokens: Tensor, canvas: Tensor, **conditioning: Any) -> tuple[Tensor, Tensor]:
    """transformers' (canvas logits (C, V), encoder's final hidden states (L, D)) of one row without padding."""
    out = theirs(input_ids=tokens[None], decoder_input_ids=canvas[None], **conditioning)
    return out.logits[0], out.encoder_last_hidden_state[0]


def padded(rows: Sequence[Tensor], side: str, junk: int = 7) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows, padded with some token."""
    width = max(map(len, rows)) + 2
    tokens, mask = torch.full((len(rows), width), junk), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(width - len(row), None)
        tokens[number, place], mask[number, place] = row, True
    return tokens, mask


FIELDS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 2},
    {"sliding_window": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    {"sliding_window": 12},
    {"sliding_window": 500, "num_key_value_heads": 4},
    {"layer_types": ["full_attention"] * 3, "num_global_key_value_heads": 4, "global_head_dim": 8},
    {"layer_types": None, "num_hidden_layers": 7},
    {"num_global_key_value_heads": None, "global_head_dim": 32},
    {"num_experts": 5, "top_k_experts": 5},
    {"moe_intermediate_size": 6},
    {"final_logit_softcapping": 1.5, "rms_norm_eps": 0.1, "max_position_embeddings": 64},
    {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 70.0, "partial_rotary_factor": 0.5},
        }
    },
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_equals_transformers_in_values_and_gradients(fields: dict, gemma_reference: Reference) -> None:
    """Prompts shorter and longer than the window, batched with padding by us and alone in transformers' class."""
    theirs = gemma_reference(**fields)
    ours, canvases = same(theirs), ids(3, CANVAS, seed=5)
    rows = [ids(length, seed=length) for length in (11, 4, 1)]
    probes = [normal(len(row), WIDTH, seed=9) for row in rows]
    probe = normal(3, CANVAS, VOCABULARY, seed=8)

    reference = [alone(theirs, row, canvas) for row, canvas in zip(rows, canvases, strict=True)]
    loss = sum((logits * p).sum() for (logits, _), p in zip(reference, probe, strict=True))
    loss = loss + sum((hidden * p).sum() for (_, hidden), p in zip(reference, probes, strict=True))
    loss.backward()
    for side in ("right", "left"):
        ours.zero_grad()
        tokens, mask = padded(rows, side)
        encoded = ours.encode(tokens, mask.long() if side == "left" else mask)
        logits = ours.logits(ours.decode(canvases, encoded))
        expected = torch.stack([values for values, _ in reference])
        torch.testing.assert_close(logits, expected, **CLOSE)
        hidden, wanted = encoded.hidden_BLD[mask], torch.cat([values for _, values in reference])
        torch.testing.assert_close(hidden, wanted, **CLOSE)
        ((logits * probe).sum() + (hidden * torch.cat(probes)).sum()).backward()
        for name, parameter in ours.named_parameters():
            wanted = theirs.get_parameter(name).grad
            if name.startswith("model.decoder.self_conditioning."):  # no signal: transformers' are zero
                assert parameter.grad is None and not wanted.any()
                continue
            scale = float(wanted.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-4 * scale, rtol=1e-3, msg=f"{side} {name}")


def test_rows_without_padding_need_no_mask(gemma_reference: Reference) -> None:
    theirs = gemma_reference()
    ours, tokens, canvases = same(theirs), ids(2, 9), ids(2, CANVAS, seed=1)
    with torch.no_grad():
        bare, masked = ours.encode(tokens), ours.encode(tokens, torch.ones(2, 9))
        expected = torch.stack([alone(theirs, row, canvas)[0] for row, canvas in zip(tokens, canvases, strict=True)])
        for encoded in (bare, masked):
            torch.testing.assert_close(ours.logits(ours.decode(canvases, encoded)), expected, **CLOSE)
    assert bare.aligned and not masked.aligned
    assert bare.lengths_B.tolist() == masked.lengths_B.tolist() == [9, 9]


def test_the_roles_keep_their_own_layer_scalars(gemma_reference: Reference) -> None:
    theirs = gemma_reference()
    ours, tokens, canvas = same(theirs), ids(1, 9), ids(1, CANVAS, seed=1)
    scalars = {key: value for key, value in ours.state_dict().items() if key.endswith("layer_scalar")}
    roles = ("model.encoder.", "model.decoder.")
    encoder, decoder = ([value for key, value in scalars.items() if key.startswith(role)] for role in roles)
    assert len(encoder) == len(decoder) == 3
    assert all(not torch.equal(one, other) for one, other in zip(encoder, decoder, strict=True))
    with torch.no_grad():
        before = ours.encode(tokens)
        scored = ours.decode(canvas, before)
        for one, other in zip(encoder, decoder, strict=True):
            other.copy_(one)
        after = ours.encode(tokens)
        assert torch.equal(before.hidden_BLD, after.hidden_BLD)
        assert not torch.allclose(ours.decode(canvas, after), scored, atol=1e-2)


def test_self_conditioning_equals_transformers(gemma_reference: Reference) -> None:
    """The signal of softcapped logits, for some canvases and zeros for the others, in values and gradients."""
    theirs = gemma_reference()
    ours, tokens, canvases = same(theirs), ids(3, 6), ids(3, CANVAS, seed=1)
    logits, use = 4 * normal(3, CANVAS, VOCABULARY), torch.tensor([True, False, True])
    probe = normal(3, CANVAS, VOCABULARY, seed=8)
    out = theirs(
        input_ids=tokens, decoder_input_ids=canvases, self_conditioning_logits=logits, self_conditioning_mask=use
    ).logits
    (out * probe).sum().backward()
    signal = ours.soft_embedding(logits) * use[:, None, None]
    mine = ours.logits(ours.decode(canvases, ours.encode(tokens), signal))
    torch.testing.assert_close(mine, out, **CLOSE)
    (mine * probe).sum().backward()
    paths = [f"self_conditioning.{name}" for name in ("gate_proj", "up_proj", "down_proj", "pre_norm")]
    for path in (f"model.decoder.{name}.weight" for name in (*paths, "embed_tokens")):
        grad = theirs.get_parameter(path).grad
        assert grad.any()
        torch.testing.assert_close(ours.get_parameter(path).grad, grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)
    with torch.no_grad():
        encoded = ours.encode(tokens)
        zeros = torch.zeros(3, CANVAS, WIDTH)
        assert torch.equal(ours.decode(canvases, encoded, zeros), ours.decode(canvases, encoded))


def test_the_head_is_the_softcapped_embedding(model: DiffusionGemma) -> None:
    hidden, head = 50 * normal(3, 4, WIDTH), model.head
    assert head.bias is None and head.weight is model.stack.embed_tokens.weight and head.softcap == 30.0
    logits = model.logits(hidden)
    torch.testing.assert_close(logits, 30.0 * torch.tanh(hidden @ head.weight.T / 30.0))
    assert logits.dtype == torch.float32 and bool((logits.abs() <= 30.0).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.logits(hidden).dtype == torch.float32


@given(data=st.data())
@settings(max_examples=12)
def test_canvases_see_the_tokens_before_them_and_nothing_else(model: DiffusionGemma, data: st.DataObject) -> None:
    """Canvases anywhere in encoded rows, several of one row: as if their prefix alone had been encoded."""
    length = data.draw(st.integers(2, 14))
    tokens = ids(2, length, seed=data.draw(st.integers(0, 99)))
    places = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(1, length)), min_size=1, max_size=4))
    rows, starts = torch.tensor([row for row, _ in places]), [start for _, start in places]
    canvases = ids(len(places), CANVAS, seed=3)
    with torch.no_grad():
        encoded = model.encode(tokens)
        together = model.decode(canvases, encoded, rows=rows, starts=starts)
        on_the_device = model.decode(canvases, encoded, rows=rows, starts=starts, starts_K=torch.tensor(starts))
        assert torch.equal(on_the_device, together)
        for number, (row, start) in enumerate(places):
            prefix = model.encode(tokens[row : row + 1, :start])
            expected = model.decode(canvases[number : number + 1], prefix)
            torch.testing.assert_close(together[number : number + 1], expected, **CLOSE)
        # What comes after a canvas's start never matters. (Other tokens share the experts' matmuls with those before
        # them, whose last bits may so change.)
        changed = tokens.clone()
        changed[:, max(starts) :] = (changed[:, max(starts) :] + 1) % VOCABULARY
        again = model.decode(canvases, model.encode(changed), rows=rows, starts=starts)
        torch.testing.assert_close(again, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [1, 4, 5, 6, 9, 12])
def test_a_canvas_inside_the_row_equals_transformers(start: int, gemma_reference: Reference) -> None:
    theirs = gemma_reference()
    ours, tokens, canvas = same(theirs), ids(1, 12), ids(1, CANVAS, seed=1)
    with torch.no_grad():
        mine = ours.logits(ours.decode(canvas, ours.encode(tokens), starts=[start]))
        torch.testing.assert_close(mine[0], alone(theirs, tokens[0, :start], canvas[0])[0], **CLOSE)


def test_starts_in_padded_rows(model: DiffusionGemma) -> None:
    """With left padding columns do not stand for positions; starts count tokens all the same."""
    rows = [ids(12, seed=1), ids(7, seed=2)]
    canvases = ids(2, CANVAS, seed=3)
    with torch.no_grad():
        expected = [model.decode(canvases[n : n + 1], model.encode(rows[n][None, :5])) for n in range(2)]
        for side in ("left", "right"):
            encoded = model.encode(*padded(rows, side))
            torch.testing.assert_close(model.decode(canvases, encoded, starts=[5, 5]), torch.cat(expected), **CLOSE)
            swapped = model.decode(canvases, encoded, rows=torch.tensor([1, 0]))
            whole = [model.decode(canvases[n : n + 1], model.encode(rows[1 - n][None])) for n in range(2)]
            torch.testing.assert_close(swapped, torch.cat(whole), **CLOSE)


def test_canvas_positions_that_are_not_there(model: DiffusionGemma) -> None:
    """A canvas with a tail masked out is a shorter canvas, whatever ids stand there."""
    tokens, canvases = ids(2, 9), ids(2, CANVAS, seed=1)
    lengths = [3, CANVAS]
    there = torch.arange(CANVAS) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        encoded = model.encode(tokens)
        masked = model.decode(canvases, encoded, canvas_mask=there)
        other = model.decode(torch.where(there, canvases, 33), encoded, canvas_mask=there)
        torch.testing.assert_close(masked[there], other[there], atol=1e-6, rtol=1e-6)
        assert torch.isfinite(masked).all()
        for n, length in enumerate(lengths):
            short = model.decode(canvases[n : n + 1, :length], model.encode(tokens[n : n + 1]))
            torch.testing.assert_close(masked[n : n + 1, :length], short, **CLOSE)
        full = model.decode(canvases, encoded, canvas_mask=torch.ones_like(there))
        torch.testing.assert_close(full, model.decode(canvases, encoded), **CLOSE)


def test_padding_has_finite_gradients_that_reach_nothing(model: DiffusionGemma) -> None:
    for side in ("left", "right"):
        tokens, mask = padded([ids(6, seed=1), ids(2, seed=2)], side, junk=39)
        tokens[mask & (tokens == 39)] = 3
        model.zero_grad()
        there = torch.tensor([[True] * CANVAS, [True] * 2 + [False] * 6])
        canvases = torch.where(there, ids(2, CANVAS) % 30, 38)
        out = model.decode(canvases, model.encode(tokens, mask), canvas_mask=there)
        out[there].sin().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        table = grads["model.decoder.embed_tokens.weight"]
        assert not table[38:].any() and table[:38].any()


def joined(past: Encoded | None, more: Encoded) -> Encoded:
    """Tokens encoded one after the other, as if they had been at once; aligned only where columns were."""
    if past is None:
        return more
    keys, values = (
        tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        for old, new in ((past.keys, more.keys), (past.values, more.values))
    )
    positions_BS = torch.cat((past.positions_BS, more.positions_BS), dim=1)
    in_place = bool((positions_BS == torch.arange(positions_BS.shape[1])).all())
    return Encoded(keys, values, more.hidden_BLD, positions_BS, more.lengths_B, aligned=in_place)


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_encoding_in_pieces_is_encoding_at_once(model: DiffusionGemma, cuts: list[int], seed: int) -> None:
    tokens, canvases = ids(2, sum(cuts), seed=seed), ids(2, CANVAS, seed=1)
    with torch.no_grad():
        whole, grown, hidden = model.encode(tokens), None, []
        for part in tokens.split(cuts, dim=1):
            grown = joined(grown, model.encode(part, past=grown))
            hidden.append(grown.hidden_BLD)
        assert isinstance(grown, Encoded) and grown.aligned
        torch.testing.assert_close(torch.cat(hidden, dim=1), whole.hidden_BLD, **CLOSE)
        assert torch.equal(grown.positions_BS, whole.positions_BS) and torch.equal(grown.lengths_B, whole.lengths_B)
        torch.testing.assert_close(model.decode(canvases, grown), model.decode(canvases, whole), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_behind_padded_prompts(side: str, model: DiffusionGemma) -> None:
    """Generation: rows of unequal prompts, each grown by a whole canvas, then the next canvas."""
    rows, added, canvases = [ids(9, seed=1), ids(3, seed=2)], ids(2, CANVAS, seed=3), ids(2, CANVAS, seed=4)
    with torch.no_grad():
        prompts = model.encode(*padded(rows, side))
        grown = joined(prompts, model.encode(added, past=prompts))
        assert grown.lengths_B.tolist() == [9 + CANVAS, 3 + CANVAS]
        out = model.decode(canvases, grown)
        for n, row in enumerate(rows):
            whole = model.encode(torch.cat((row, added[n]))[None])
            torch.testing.assert_close(out[n : n + 1], model.decode(canvases[n : n + 1], whole), **CLOSE)
            torch.testing.assert_close(grown.hidden_BLD[n : n + 1], whole.hidden_BLD[:, -CANVAS:], **CLOSE)
        # A piece that is padding in some rows adds nothing to them.
        mask = torch.tensor([[True] * CANVAS, [False] * CANVAS])
        partly = joined(prompts, model.encode(added, mask, past=prompts))
        assert partly.lengths_B.tolist() == [9 + CANVAS, 3]
        # Some rows of what is past, in another order, with their pieces.
        turned, picked = torch.tensor([1, 0]), torch.tensor([1])
        for rows_K in (turned, picked):
            part = model.encode(added[rows_K], past=prompts, rows=rows_K)
            assert torch.equal(part.lengths_B, grown.lengths_B[rows_K])
            torch.testing.assert_close(part.hidden_BLD, grown.hidden_BLD[rows_K], **CLOSE)
            torch.testing.assert_close(part.keys[-1], grown.keys[-1][rows_K, :, -CANVAS:], **CLOSE)
        kept = model.decode(canvases, partly)
        torch.testing.assert_close(kept[:1], out[:1], **CLOSE)
        torch.testing.assert_close(kept[1:], model.decode(canvases[1:], model.encode(rows[1][None])), **CLOSE)


def test_left_padding_has_no_position(model: DiffusionGemma) -> None:
    encoded = model.encode(*padded([ids(9, seed=1), ids(3, seed=2)], "left"))
    expected = [[PADDING_POSITION] * 2 + list(range(9)), [PADDING_POSITION] * 8 + [0, 1, 2]]
    assert encoded.positions_BS.tolist() == expected


def test_wider_bounds_change_nothing(model: DiffusionGemma) -> None:
    """Bounds on the host choose shapes; where a row's canvas starts, the device says."""
    lengths, canvases = torch.tensor([9, 3, 7]), ids(3, CANVAS, seed=4)
    tokens = ids(3, 16)
    with torch.no_grad():
        whole = model.encode(tokens)
        encoded = replace(whole, lengths_B=lengths)
        expected = model.decode(canvases, whole, starts=lengths.tolist())
        for bounds in ((3, 9), (0, 16), (2, 9), (3, 12)):
            torch.testing.assert_close(model.decode(canvases, encoded, bounds=bounds), expected, **CLOSE)
        rows = torch.tensor([2, 0])
        some = model.decode(canvases[rows], encoded, rows=rows, bounds=(0, 16))
        torch.testing.assert_close(some, expected[rows], **CLOSE)
        same = replace(whole, lengths_B=torch.full((3,), 9))
        alike = model.decode(canvases, whole, starts=[9] * 3)
        assert torch.equal(model.decode(canvases, same, bounds=(9, 9)), alike)
        torch.testing.assert_close(model.decode(canvases, same, bounds=(8, 16)), alike, **CLOSE)


def test_detached_keys_and_values_let_no_gradient_through(model: DiffusionGemma) -> None:
    tokens, canvases = ids(2, 9), ids(2, CANVAS, seed=1)
    encoded = model.encode(tokens)
    detached = encoded.detach()
    assert not any(tensor.requires_grad for tensor in (*detached.keys, *detached.values))
    assert detached.hidden_BLD is encoded.hidden_BLD
    assert torch.equal(model.decode(canvases, detached), model.decode(canvases, encoded))


def test_checkpointing_in_both_roles_changes_memory_not_gradients(
    network: Callable[..., DiffusionGemma], saved_numbers: Callable
) -> None:
    model = network()
    tokens, canvases, signal = padded([ids(11), ids(6)], "right"), ids(2, CANVAS, seed=1), normal(2, CANVAS, WIDTH)

    def both_roles() -> Tensor:
        encoded = model.encode(*tokens)
        return model.decode(canvases, encoded, signal).sin().sum() + encoded.hidden_BLD[tokens[1]].cos().sum()

    saved, grads = [], []
    for on in (False, True):
        model.stack.activation_checkpointing = on
        model.zero_grad()
        loss, count = saved_numbers(both_roles)
        loss.backward()
        saved.append(count)
        grads.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    assert saved[1] < 0.6 * saved[0]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_another_dispatch_takes_the_place_of_the_local_one(network: Callable[..., DiffusionGemma]) -> None:
    model, tokens, canvas = network(), ids(2, 5), ids(2, CANVAS, seed=1)
    seen = []

    def counting(hidden_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor, experts: nn.Module) -> Tensor:
        seen.append((len(hidden_ND), experts))
        return local_dispatch(hidden_ND, experts_NT, weights_NT, experts)

    with torch.no_grad():
        before = model.decode(canvas, model.encode(tokens))
        for layer in model.stack.layers:
            layer.dispatch = counting
        assert torch.equal(model.decode(canvas, model.encode(tokens)), before)
    held = [layer.experts for layer in model.stack.layers]
    assert seen == [(10, experts) for experts in held] + [(2 * CANVAS, experts) for experts in held]
    assert set(model.state_dict()) == set(network().state_dict())


def test_bf16_is_close_to_transformers_in_bf16(gemma_reference: Reference) -> None:
    """All experts take part, so that rounding cannot choose others."""
    theirs = gemma_reference(num_experts=2, top_k_experts=2)
    ours, tokens, canvas = same(theirs), ids(11), ids(CANVAS, seed=1)
    with torch.no_grad():
        exact = ours.logits(ours.decode(canvas[None], ours.encode(tokens[None])))[0]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = ours.decode(canvas[None], ours.encode(tokens[None]))
            mixed = ours.logits(hidden)[0]
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if tensor.dim() and "inv_freq" not in name:  # `.bfloat16()` would round the rotary frequencies too
                tensor.data = tensor.data.bfloat16()
        low = same(theirs)
        rough = low.decode(canvas[None], low.encode(tokens[None]))
        reference = alone(theirs, tokens, canvas)[0]
        error = float((reference - exact).abs().max())
        assert 0 < error < 0.3 * float(exact.std())
        for logits in (mixed, low.logits(rough)[0]):
            assert logits.dtype == torch.float32
            assert float((logits - exact).abs().max()) < 2 * error
    assert rough.dtype == torch.bfloat16


def test_a_plain_call_is_refused(model: DiffusionGemma) -> None:
    with pytest.raises(ModelError, match="no single forward pass; call encode.*then decode"):
        model(ids(1, 4))


def test_too_long_an_input_is_refused(network: Callable[..., DiffusionGemma]) -> None:
    model = network(max_position_embeddings=20)
    with pytest.raises(ModelError, match="21 tokens is longer than .* max_position_embeddings 20"):
        model.encode(ids(1, 21))
    with torch.no_grad():
        encoded = model.encode(ids(1, 15))
        with pytest.raises(ModelError, match="21 tokens"):
            model.encode(ids(1, 6), past=encoded)
        assert model.encode(ids(1, 5), past=encoded).lengths_B.tolist() == [20]


def test_fresh_weights_depend_on_the_seed_alone(gemma_values: Callable[..., dict]) -> None:
    config = parse_config(gemma_values(initializer_range=0.5), "config.json")

    def fresh(seed: int) -> dict[str, Tensor]:
        model = DiffusionGemma(config)
        initialise(model, torch.Generator().manual_seed(seed))
        return model.state_dict()

    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    for key, tensor in one.items():
        if "norm" in key or key.endswith("scalar") or ("router" in key and "proj" not in key):
            assert (tensor == 1).all(), key
        else:
            assert not torch.equal(tensor, other[key]) and 0.35 < float(tensor.std()) < 0.65, key
    assert not one["model.decoder.embed_tokens.weight"][0].any()
