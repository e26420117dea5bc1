"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): NF4 codes with quantized block scales.

bitsandbytes packs and unpacks. A matrix is brought back when it is multiplied by, in the forward and again in the
backward pass, so that one whole matrix exists at a time, and none waits for the backward pass.

Shapes: M rows, sorted by expert where there are experts, E experts, I inputs, O outputs, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.experts import Experts, gated_mlps, grouped_linear
from unmask.models.registry import family_of
from unmask.models.weights import Piece, base_tensors, whole_piece, whole_place

_BLOCK = 64  # elements with a scale of their own


class Packed(nn.Module):
    """A tensor as NF4 codes, two a byte, in blocks of 64 whose scales are quantized as well."""

    codes: Tensor

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype, self.state = tensor.shape, tensor.dtype, None
        room = torch.empty(-(-tensor.numel() // 2), 1, dtype=torch.uint8, device=tensor.device)
        self.register_buffer("codes", room)
        if not tensor.is_meta:
            self.pack(tensor)

    def pack(self, tensor: Tensor) -> None:
        """Put a tensor's values in, on the device where the codes are."""
        from bitsandbytes.functional import quantize_4bit

        # Flat, because on the CPU blocks must not end inside a row.
        flat = tensor.detach().to(self.codes.device, self.dtype).flatten()
        self.codes, self.state = quantize_4bit(flat, compress_statistics=True, quant_type="nf4")

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, of a scale in 8 bits for each block, and of an fp32 scale for 256 of those."""
        blocks = -(-self.shape.numel() // _BLOCK)
        return self.codes.numel() + blocks + 4 * -(-blocks // 256)

    def dense(self) -> Tensor:
        """Return the tensor that the codes stand for, in the dtype that it came in."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes, self.state).view(self.shape)  # pyright: ignore[reportArgumentType]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.codes.device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """rows · Wᵀ, or `grouped_linear` where counts are given; gradients reach the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts_E: Tensor | None, packed: Packed) -> Tensor:
        ctx.counts_E, ctx.packed, ctx.dtype = counts_E, packed, rows.dtype
        weight = packed.dense()
        return F.linear(rows, weight.to(rows.dtype)) if counts_E is None else grouped_linear(rows, weight, counts_E)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.packed.dense().to(gradients[0].dtype)
        if ctx.counts_E is None:
            return (gradients[0] @ weight).to(ctx.dtype), None, None
        return grouped_linear(gradients[0], weight.transpose(1, 2), ctx.counts_E).to(ctx.dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen `nn.Linear` whose matrix is packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = Packed(linear.weight)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I) unpacked; DoRA takes its norms."""
        return self.packed.dense()

    def forward(self, rows: Tensor) -> Tensor:
        """Return the linear map of (..., I), (..., O)."""
        out: Tensor = _FrozenProduct.apply(rows, None, self.packed)  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class QuantizedExperts(nn.Module):
    """Frozen `Experts` whose stacked matrices are packed."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.num_experts, self.activation = experts.num_experts, experts.activation
        self.packed = nn.ModuleDict({name: Packed(weight_EOI) for name, weight_EOI in experts.named_parameters()})

    def linear(self, name: str, rows_MI: Tensor, counts_E: Tensor) -> Tensor:
        """Multiply rows by the matrices called `name`, each run of rows by its expert's."""
        return _FrozenProduct.apply(rows_MI, counts_E, self.packed[name])  # pyright: ignore[reportReturnType]

    def forward(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Return each row's output of its expert, (M, D); arguments as in `Experts.forward`."""
        return gated_mlps(self.linear, self.activation, sorted_MD, counts_E)


@torch.no_grad()
def quantize_base(model: nn.Module) -> None:
    """Put the adaptable linear layers and the experts of a network, adapters attached, into 4 bits, in place.

    Embedding, head, router and norms stay as they are. On the meta device room is made for codes, which `base_pieces`
    fills.
    """
    patterns = family_of(model.config).lora.linears
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            new: nn.Module = QuantizedExperts(module)
        elif isinstance(module, nn.Linear) and _is_base(name, patterns):
            new = QuantizedLinear(module)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def packed_elements(model: nn.Module) -> int:
    """Return how many parameters the packed tensors of a network stand for; they are not among `parameters()`."""
    return sum(packed.shape.numel() for packed in packed_tensors(model).values())


def packed_tensors(model: nn.Module) -> dict[str, Packed]:
    """Return state-dict key of the tensor, were it not packed → packed tensor."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[f"{name}.weight"] = module.packed
        elif isinstance(module, QuantizedExperts):
            found |= {f"{name}.{weight}": packed for weight, packed in module.packed.items()}
    return found


def base_pieces(model: nn.Module) -> Iterator[tuple[str, Piece]]:
    """Yield (key, piece) of all that the bare network's files hold, for `fill`; packed tensors pack what arrives.

    Keys are those of `base_tensors`. An adapter's own tensors are left out.
    """
    packed = packed_tensors(model)
    codes = {id(each.codes) for each in packed.values()}
    held = model.state_dict(keep_vars=True).items()
    pieces = [(name, whole_piece(tensor)) for name, tensor in held if id(tensor) not in codes]
    for name, each in packed.items():
        pieces.append((name, Piece(each.codes, each.shape, whole_place(each.shape), each.pack)))
    return base_tensors(pieces)


def _is_base(name: str, patterns: tuple[str, ...]) -> bool:
    owner = name.removesuffix(".base_layer")
    return ".lora_" not in name and any(fnmatchcase(owner, pattern) for pattern in patterns)
