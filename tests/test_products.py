"""Products of large fp32 matrices by oneDNN against PyTorch's own, whatever this machine is faster with."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask import products
from unmask.products import add_product, by_onednn, linear, product, write_columns, write_product

CLOSE = {"atol": 2e-4, "rtol": 1e-5}


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Each library in turn, for products of any size, in parts that do not divide them."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "_LARGE", 1)
    monkeypatch.setattr(products, "_AT_ONCE", 300)
    monkeypatch.setattr(products, "_ROWS", 4)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "summed", "columns"), [(50, 30, 70), (1, 64, 33), (7, 1, 5), (33, 16, 1)])
def test_every_product_is_the_matrix_product(library: bool, rows: int, summed: int, columns: int) -> None:
    left, right = normal(rows, summed), normal(summed, columns, seed=1)
    # As losses have it: transposed, so that each position's column is strided.
    for right_KN in (right, right.t().contiguous().t()):
        theirs = (left.double() @ right_KN.double()).float()
        assert by_onednn(left, right_KN) == library
        torch.testing.assert_close(product(left, right_KN), theirs, **CLOSE)
        torch.testing.assert_close(write_columns(torch.empty(rows, columns), left, right_KN), theirs, **CLOSE)
        torch.testing.assert_close(
            write_product(torch.empty(rows, columns), left, right_KN, 0.3), 0.3 * theirs, **CLOSE
        )
        total = torch.ones(rows, columns)
        add_product(total, left, right_KN)
        add_product(total, left.t().contiguous().t(), right_KN)
        torch.testing.assert_close(total, 1 + 2 * theirs, **CLOSE)


def test_what_is_written_goes_where_it_belongs_in_a_larger_matrix(library: bool) -> None:
    left, right = normal(20, 8), normal(8, 40, seed=1)
    room = torch.zeros(22, 40)
    assert write_product(room[1:21], left, right).data_ptr() == room[1].data_ptr()
    torch.testing.assert_close(room[1:21], left @ right, **CLOSE)
    assert not room[0].any()
    assert not room[21].any()
    wide = torch.zeros(20, 44)
    write_columns(wide[:, 2:42], left, right)
    torch.testing.assert_close(wide[:, 2:42], left @ right, **CLOSE)
    assert not wide[:, :2].any()
    assert not wide[:, 42:].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_linear_is_linear(library: bool, shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(6, 9, bias=bias).requires_grad_(False)
    hidden = normal(*shape)
    found, theirs = linear(hidden, layer.weight, layer.bias), layer(hidden)
    assert found.shape == theirs.shape
    torch.testing.assert_close(found, theirs, **CLOSE)
    strided = normal(2, 5, 12)[..., ::2]
    torch.testing.assert_close(linear(strided, layer.weight, layer.bias), layer(strided), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_linear_has_the_gradients_of_linear(library: bool, shape: tuple[int, ...], frozen: tuple, bias: bool) -> None:
    inputs = {"hidden": normal(*shape), "weight": normal(9, 6, seed=1), "bias": normal(9, seed=2) if bias else None}
    upstream = normal(*shape[:-1], 9, seed=3)
    wanted = [name for name, value in inputs.items() if value is not None and name not in frozen]
    if not wanted:
        return

    def gradients(function: Callable[..., Tensor]) -> list[Tensor | None]:
        values = {name: None if value is None else value.clone() for name, value in inputs.items()}
        for name in wanted:
            values[name].requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
        function(*values.values()).backward(upstream)
        return [values[name].grad for name in wanted]  # pyright: ignore[reportOptionalMemberAccess]

    torch.testing.assert_close(gradients(linear), gradients(F.linear), **CLOSE)


def test_a_frozen_layer_keeps_nothing_of_its_input(library: bool) -> None:
    """As LoRA's base layers, of which there are hundreds."""
    kept: list[Tensor] = []
    layer = nn.Linear(6, 9).requires_grad_(False)
    hidden = normal(4, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(hidden, layer.weight, layer.bias).sum().backward()
    assert not any(tensor.data_ptr() == hidden.data_ptr() for tensor in kept)


def test_no_gradient_is_lost(library: bool) -> None:
    """oneDNN's operation has none."""
    weight = normal(9, 6, seed=1).requires_grad_()
    assert not by_onednn(normal(4, 9), weight)
    assert product(normal(4, 9), weight).requires_grad
    with torch.no_grad():
        assert by_onednn(normal(4, 9), weight) == library


def test_autocast_has_its_own_way(library: bool) -> None:
    layer = nn.Linear(6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(normal(4, 6), layer.weight, layer.bias).dtype == torch.bfloat16


def test_other_matrices_go_the_other_way(library: bool) -> None:
    left, right = normal(8, 6), normal(6, 4)
    assert not by_onednn(left.double(), right.double())
    assert not by_onednn(left.bfloat16(), right.bfloat16())
    assert not by_onednn(normal(8, 12)[:, ::2], right)
    assert not by_onednn(left.to("meta"), right.to("meta"))
    narrow = write_product(torch.empty(8, 4), left.bfloat16(), right.bfloat16())
    torch.testing.assert_close(narrow, (left.bfloat16() @ right.bfloat16()).float())
    total = torch.zeros(8, 4, dtype=torch.float64)
    add_product(total, left.double(), right.double())
    torch.testing.assert_close(total, left.double() @ right.double())


@pytest.mark.parametrize("columns", [5, 30, 4000])
def test_a_part_is_never_a_sliver(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_AT_ONCE", 300)
    monkeypatch.setattr(products, "_ROWS", 8)
    parts = products._parts(torch.empty(1, 1).expand(100, columns))
    assert [row for part in parts for row in range(100)[part]] == list(range(100))
    assert parts[0].stop == max(8, 300 // columns)


def test_small_products_make_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    assert not by_onednn(normal(64, 64), normal(64, 64))
    assert by_onednn(torch.empty(1024, 256), torch.empty(256, 256))
