"""The network against golden logits, an independent implementation and the laws that no implementation may break."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from unmask.errors import ModelError
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise, rotary_tables, rotate

Make = Callable[..., LLaDA]


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain(model: LLaDA, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Logits from the published formulas alone: complex rotation, a softmax a head, no library layer but matmul."""
    c = model.config
    w = dict(model.named_parameters())
    kv_heads = c.n_kv_heads or c.n_heads
    size = c.d_model // c.n_heads
    rows, length = tokens.shape
    positions = torch.arange(length).expand(rows, length) if positions is None else positions
    angles = positions.double()[..., None] / c.rope_theta ** (torch.arange(0, size, 2).double() / size)
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"model.transformer.{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        bias = w.get(f"model.transformer.{name}.bias")
        return x @ w[f"model.transformer.{name}.weight"].T + (0 if bias is None else bias)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : size // 2].double(), x[..., size // 2 :].double()) * turn
        return torch.cat((pairs.real, pairs.imag), -1).float()

    x = w["model.transformer.wte.weight"][tokens] * (math.sqrt(c.d_model) if c.input_emb_norm else 1)
    for n in range(c.n_layers):
        block = f"blocks.{n}"
        y = norm(x, f"{block}.attn_norm")
        q, k, v = (linear(y, f"{block}.{name}_proj") for name in "qkv")
        heads = []
        for h in range(c.n_heads):
            g = h // (c.n_heads // kv_heads)
            query, key = turned(q[..., h * size : (h + 1) * size]), turned(k[..., g * size : (g + 1) * size])
            scores = query @ key.transpose(1, 2) / math.sqrt(size)
            if mask is not None:
                scores = scores + torch.where(mask[:, None, :].bool(), 0.0, -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., g * size : (g + 1) * size])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn_out")
        y = norm(x, f"{block}.ff_norm")
        gate = linear(y, f"{block}.ff_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, f"{block}.up_proj"), f"{block}.ff_out")
    x = norm(x, "ln_f")
    logits = x @ w["model.transformer.wte.weight"].T if c.weight_tying else linear(x, "ff_out")
    return logits / math.sqrt(c.d_model) if c.scale_logits else logits


@pytest.mark.parametrize("case", ["forward", "left_padded", "right_padded"])
def test_golden_logits(case: str, reference_model: LLaDA, reference_folder) -> None:
    golden = load_file(reference_folder / "expected.safetensors")
    tokens, mask = golden["forward.input_ids"], golden.get(f"{case}.attention_mask")
    with torch.no_grad():
        logits = reference_model.logits(reference_model(tokens, mask))
    attended = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    assert (case == "forward") == bool(attended.all())
    torch.testing.assert_close(logits[attended], golden[f"{case}.logits"][attended], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "weight_tying": True},
        {"include_qkv_bias": True},
        {"include_bias": True, "n_kv_heads": 2},
        {"scale_logits": True, "input_emb_norm": True},
        {"mlp_hidden_size": None, "mlp_ratio": 2, "rope_theta": 7.0, "rms_norm_eps": 0.1},
        {"multi_query_attention": True, "n_kv_heads": 1},
        {"init_fn": "normal", "init_std": 0.3, "embedding_size": 41},
    ],
    ids=str,
)
def test_equals_the_formulas_in_values_and_gradients(fields: dict, network: Make) -> None:
    model = network(**fields)
    tokens = ids(3, 9)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [1] * 5 + [0] * 4])
    probe = torch.randn(3, 9, model.config.rows, generator=torch.Generator().manual_seed(3)) * mask[..., None]

    def run(function: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = function()
        (logits * probe).sum().backward()
        grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        return logits.detach(), grads

    ours, our_grads = run(lambda: model.logits(model(tokens, mask)))
    theirs, their_grads = run(lambda: plain(model, tokens, mask))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=3e-5, rtol=3e-5)
    for name, grad in our_grads.items():
        scale = float(their_grads[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(grad, their_grads[name], atol=1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("fields", "biased"),
    [
        ({}, set()),
        ({"include_qkv_bias": True}, {"q_proj", "k_proj", "v_proj"}),
        (
            {"include_bias": True},
            {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "blocks.ff_out", "transformer.ff_out"},
        ),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_which_layers_have_biases(fields: dict, biased: set[str], network: Make) -> None:
    found = set()
    for name in network(**fields).state_dict():
        if name.endswith(".bias"):
            owner, layer = name.split(".")[-3:-1]
            found.add(layer if layer != "ff_out" else f"{'blocks' if owner.isdigit() else owner}.ff_out")
    assert found == biased


def test_position_ids_reach_the_rotation(network: Make) -> None:
    model, tokens = network(), ids(2, 7)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [5, 3, 9, 0, 1, 40, 7]])
    with torch.no_grad():
        ours = model.logits(model(tokens, None, positions))
        torch.testing.assert_close(ours, plain(model, tokens, None, positions), atol=3e-5, rtol=3e-5)
        assert not torch.allclose(ours[1], model.logits(model(tokens))[1], atol=1e-3)


@given(shift=st.integers(0, 40), length=st.integers(2, 9), seed=st.integers(0, 99))
def test_only_relative_positions_matter(network: Make, shift: int, length: int, seed: int) -> None:
    model, tokens = network(), ids(1, length, seed)
    with torch.no_grad():
        moved = model(tokens, None, torch.arange(shift, shift + length)[None])
        torch.testing.assert_close(moved, model(tokens), atol=2e-5, rtol=1e-4)


@given(first=st.integers(1, 8), second=st.integers(1, 8), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_packed_documents_are_as_alone(network: Make, first: int, second: int, padding: int, seed: int) -> None:
    model = network(n_kv_heads=2)
    tokens = ids(1, first + second + padding, seed)
    document = torch.tensor([0] * first + [1] * second + [-1] * padding)
    # Padding attends to nothing at all, which must not spoil anything either.
    mask = (document[:, None] == document[None, :]) & (document >= 0)
    positions = torch.tensor([[*range(first), *range(second), *([0] * padding)]])
    with torch.no_grad():
        packed = model.logits(model(tokens, mask[None, None], positions))
        left = model.logits(model(tokens[:, :first]))
        right = model.logits(model(tokens[:, first : first + second]))
    assert torch.isfinite(packed).all()
    torch.testing.assert_close(packed[:, :first], left, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(packed[:, first : first + second], right, atol=3e-5, rtol=1e-4)


def test_rows_that_attend_to_nothing_have_finite_gradients(network: Make) -> None:
    model, tokens = network(), ids(2, 5)
    padding = torch.tensor([[True] * 5, [False] * 5])
    packing = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    packing[0, 0, :3, :3] = True
    for mask in (padding, packing):
        model.zero_grad()
        hidden = model(tokens, mask)
        hidden[0, :3].square().sum().backward()
        assert torch.isfinite(hidden).all()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads) and any(grad.any() for grad in grads)


@given(keep=st.lists(st.booleans(), min_size=2, max_size=10).filter(any), seed=st.integers(0, 99))
def test_what_padding_holds_never_matters(network: Make, keep: list[bool], seed: int) -> None:
    model, mask = network(), torch.tensor([keep])
    tokens = ids(1, len(keep), seed)
    other = torch.where(mask, tokens, ids(1, len(keep), seed + 1))
    with torch.no_grad():
        assert torch.equal(model(tokens, mask)[mask], model(other, mask)[mask])
        assert torch.equal(model(tokens, mask.long())[mask], model(tokens, mask)[mask])
        # The same mask in its packed form.
        square = mask[:, None, None, :].expand(1, 1, len(keep), len(keep))
        torch.testing.assert_close(model(tokens, square)[mask], model(tokens, mask)[mask])


@pytest.mark.parametrize("shape", [(3,), (1, 3, 3), (1, 1, 1, 3, 3)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...], network: Make) -> None:
    with pytest.raises(ModelError, match="attention_mask"):
        network()(ids(1, 3), torch.ones(shape, dtype=torch.bool))


def test_additive_masks_are_refused_for_they_mean_the_opposite(network: Make) -> None:
    with pytest.raises(ModelError, match="bool"):
        network()(ids(1, 3), torch.zeros(1, 1, 3, 3))


def test_too_long_an_input_is_refused(network: Make) -> None:
    with pytest.raises(ModelError, match="65 tokens.*max_sequence_length 64"):
        network()(ids(1, 65))
    assert network()(ids(1, 64)).shape == (1, 64, 24)


def test_grouped_heads_equal_repeated_heads(network: Make) -> None:
    grouped, full = network(n_kv_heads=2, include_qkv_bias=True), network(n_kv_heads=4, include_qkv_bias=True)
    state = grouped.state_dict()
    for name in state:
        if ".k_proj." in name or ".v_proj." in name:
            state[name] = state[name].unflatten(0, (2, 6)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = ids(2, 8)
    outputs = []
    for model in (grouped, full):
        logits = model.logits(model(tokens))
        logits.sin().sum().backward()
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(grouped.named_parameters(), full.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        expected = theirs.grad
        if ".k_proj." in name or ".v_proj." in name:
            expected = expected.unflatten(0, (2, 2, 6)).sum(1).flatten(0, 1)
        torch.testing.assert_close(ours.grad, expected, atol=1e-4, rtol=1e-3, msg=name)


def test_tied_equals_untied_with_equal_matrices(network: Make) -> None:
    tied, untied = network(weight_tying=True), network()
    head, table = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    assert head not in tied.state_dict()
    untied.load_state_dict({**tied.state_dict(), head: tied.state_dict()[table]})
    tokens = ids(2, 6)
    outputs = []
    for model in (tied, untied):
        logits = model.logits(model(tokens))
        logits.sin().sum().backward()
        outputs.append(logits.detach())
    torch.testing.assert_close(outputs[0], outputs[1])
    grads = {name: parameter.grad for name, parameter in untied.named_parameters()}
    torch.testing.assert_close(tied.transformer.wte.weight.grad, grads[table] + grads[head], atol=1e-5, rtol=1e-4)  # type: ignore[operator]


def test_the_head_is_the_linear_map_of_logits(network: Make) -> None:
    for fields in ({"scale_logits": True, "include_bias": True}, {"weight_tying": True}, {}):
        model = network(**fields)
        hidden = model(ids(1, 4))
        head = model.head
        assert (head.bias is not None) == bool(fields.get("include_bias")) and head.softcap is None
        expected = head.scale * hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        torch.testing.assert_close(model.logits(hidden), expected)


def test_checkpointing_changes_memory_not_gradients(network: Make, saved_numbers: Callable) -> None:
    model, tokens = network(n_layers=3), ids(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    saved, grads = [], []
    for on in (False, True):
        model.transformer.activation_checkpointing = on
        model.zero_grad()
        loss, count = saved_numbers(lambda: model(tokens, mask).sin().sum())
        loss.backward()
        saved.append(count)
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert saved[1] < 0.6 * saved[0]
    assert len(grads[0]) == len(list(model.parameters())) - 1  # the head took no part
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_bf16_stays_close_to_fp32(network: Make) -> None:
    model = network(rope_theta=500000.0, max_sequence_length=4096)
    positions = torch.arange(4064, 4096)[None]
    tokens = ids(1, 32)
    with torch.no_grad():
        exact = model.logits(model(tokens, None, positions))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.logits(model(tokens, None, positions))
        rough = model.bfloat16()(tokens, None, positions)
        rough_logits = model.logits(rough)
    assert rough.dtype == mixed.dtype == torch.bfloat16
    spread = float(exact.std())
    assert float((mixed.float() - exact).abs().max()) < 0.1 * spread
    assert float((rough_logits.float() - exact).abs().max()) < 0.1 * spread


def test_rotation_keeps_its_angles_in_bf16() -> None:
    """bf16 has 8 bits: positions near 4096 would be 16 apart."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, 1, 1, 64, generator=generator).bfloat16().expand(1, 1, 4096, 64)
    cos, sin = rotary_tables(torch.arange(4096)[None], 64, 500000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 1, 4096, 32)
    turned = rotate(vector, cos, sin)
    assert turned.dtype == torch.bfloat16
    angles = torch.arange(4096).double()[:, None] / 500000.0 ** (torch.arange(0, 64, 2).double() / 64)
    pairs = torch.complex(vector[0, 0, :, :32].double(), vector[0, 0, :, 32:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    exact = torch.cat((pairs.real, pairs.imag), -1)
    # Computed in fp32 and rounded once: nearly every number is the bf16 nearest to the exact one.
    assert float((turned[0, 0] == exact.bfloat16()).double().mean()) > 0.98


def test_fresh_weights_follow_the_init_functions() -> None:
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 256, "vocab_size": 500}
    ids = {"mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    def drawn(seed: int = 0, **fields) -> dict[str, Tensor]:
        model = LLaDA(LLaDAConfig(**(sizes | ids | fields)))  # type: ignore[arg-type]
        initialise(model, torch.Generator().manual_seed(seed))
        return {name.removeprefix("model.transformer."): tensor for name, tensor in model.state_dict().items()}

    mitchell = drawn()
    cut = 0.9866  # deviation of a unit normal cut at three
    for name, expected in {
        "wte.weight": 1 / 8,
        "ff_out.weight": 1 / 8,
        "blocks.3.q_proj.weight": 1 / 8,
        "blocks.2.up_proj.weight": 1 / 8,
        "blocks.0.attn_out.weight": (2 * 64 * 1) ** -0.5,
        "blocks.3.attn_out.weight": (2 * 64 * 4) ** -0.5,
        "blocks.3.ff_out.weight": (2 * 256 * 4) ** -0.5,
    }.items():
        assert float(mitchell[name].std()) == pytest.approx(cut * expected, rel=0.05), name
        assert float(mitchell[name].abs().max()) <= 3.0001 * expected, name
    assert (mitchell["ln_f.weight"] == 1).all() and (mitchell["blocks.1.attn_norm.weight"] == 1).all()
    normal = drawn(init_fn="normal", init_std=0.5)
    assert float(normal["blocks.3.ff_out.weight"].std()) == pytest.approx(0.5, rel=0.02)
    assert float(normal["blocks.3.ff_out.weight"].abs().max()) > 1.5
    clipped = drawn(init_fn="normal", init_std=0.5, init_cutoff_factor=2.0)
    assert 0.99 < float(clipped["blocks.3.ff_out.weight"].abs().max()) <= 1.0
    again, other = drawn(), drawn(seed=1)
    assert all(torch.equal(mitchell[name], again[name]) for name in mitchell)
    assert not torch.equal(mitchell["wte.weight"], other["wte.weight"])
