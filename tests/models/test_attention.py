"""FlexAttention against SDPA with the same mask: forward passes on the CPU, where flex runs uncompiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.distributed import runtime
from unmask.distributed.runtime import flex_available
from unmask.models import layers
from unmask.models.layers import attend, prepare_mask

ROWS, LENGTH = 3, 150  # more than one block of 128, and not a whole number of them


def padding() -> Tensor:
    lengths_B = torch.tensor([150, 97, 1])
    return (torch.arange(LENGTH) < lengths_B[:, None])[:, None, None, :]


def packing() -> Tensor:
    document_BL = torch.stack([torch.arange(LENGTH) // size for size in (150, 40, 7)])
    return (document_BL[:, :, None] == document_BL[:, None, :])[:, None]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let flex run as it stands, and count its calls."""
    calls: list[int] = []

    def eager(*tensors: Tensor, **options) -> Tensor:
        calls.append(1)
        return flex_attention(*tensors, **options)  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(layers, "compiled_flex", lambda: eager)
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("make", [padding, packing, lambda: packing()[1:2]], ids=["padding", "packing", "one for all"])
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_is_sdpa_with_the_same_mask(make, groups: int, uncompiled: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(ROWS, heads, LENGTH, 16, generator=generator) for heads in (4, groups, groups))
    mask = make()
    prepared = prepare_mask(mask, "flex", ROWS, LENGTH, LENGTH)
    assert isinstance(prepared, BlockMask)
    torch.testing.assert_close(attend(q, k, v, prepared), attend(q, k, v, mask))
    assert len(uncompiled) == 1
    assert not torch.allclose(attend(q, k, v, prepared), attend(q, k, v, None), atol=1e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_network_prepares_its_mask_once(network, monkeypatch: pytest.MonkeyPatch, uncompiled: list[int]) -> None:
    from unmask.models.llada import model as module

    made: list[object] = []
    monkeypatch.setattr(module, "prepare_mask", lambda *given: made.append(prepare_mask(*given)) or made[-1])
    model = network(n_kv_heads=2, d_model=64).eval()
    ids = torch.randint(27, (2, 20), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(20) < torch.tensor([20, 6])[:, None]
    with torch.no_grad():
        expected = model(ids, keep)
        assert not uncompiled  # SDPA unless asked
        model.transformer.attention_kernel = "flex"
        found = model(ids, keep)
    torch.testing.assert_close(found, expected)
    assert [type(mask) for mask in made] == [torch.Tensor, BlockMask] and len(uncompiled) == 2  # one a layer


def test_other_masks_and_the_cpu_stay_with_sdpa() -> None:
    assert not flex_available(torch.device("cpu"))
    assert prepare_mask(None, "flex", ROWS, LENGTH, LENGTH) is None
    mask, per_head = packing(), packing().expand(-1, 4, -1, -1)
    assert prepare_mask(mask, "sdpa", ROWS, LENGTH, LENGTH) is mask
    assert prepare_mask(per_head, "flex", ROWS, LENGTH, LENGTH) is per_head


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flex_wants_ampere(capability, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object())
    assert flex_available(torch.device("cuda")) is expected
