"""Expert parallelism: each rank of an `ep` group holds some experts, and a token travels to those the router chose.

It travels to every one of them, however unevenly that falls out; nothing is dropped or padded. Per layer and pass there
are two exchanges of tokens and one of counts; the counts are the only thing that the host waits for, because it has to
know how much comes from whom (torch.distributed._functional_collectives).

Shapes: N tokens of this rank, D width, E experts of the whole group, H experts held here, P ranks of the group, T
experts a token, M = N · T pairs sent, R pairs received.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from unmask.models.experts import Dispatch, sort_by_expert
from unmask.ops.head import compute_dtype
from unmask.ops.rows import in_order, inverse


def narrow_experts(experts: nn.Module, rank: int, size: int) -> None:
    """Cut every parameter of a mixture of experts, adapters included, down to the experts of one rank of `size`."""
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            held = len(parameter) // size
            part = parameter.detach()[rank * held : (rank + 1) * held].clone()
            setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def expert_dispatch(group: ProcessGroup) -> Dispatch:
    """Return the dispatch for experts that are shared out over the ranks of a group, rank p holding the p-th run."""
    size = dist.get_world_size(group)

    @torch.compiler.disable  # the host must know how much travels
    def dispatch(hidden_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor, experts: nn.Module) -> Tensor:
        """As `experts.local_dispatch`, to which it is equal: each pair's expert and the order of sums are the same."""
        tokens, choices = experts_NT.shape
        held = len(next(experts.parameters()))  # FSDP2 shards over other ranks than these: the length is the whole one
        order_M, counts_E = sort_by_expert(experts_NT, held * size)
        received_E = all_to_all_single(counts_E, None, None, group)
        sent_E, came_E = torch.stack((counts_E, received_E)).tolist()
        # [p][h]: pairs that go to expert h of rank p, and those that come from rank p for expert h here.
        sent, came = ([each[at : at + held] for at in range(0, len(each), held)] for each in (sent_E, came_E))
        send, receive = ([sum(of_rank) for of_rank in counts] for counts in (sent, came))
        inverse_M = inverse(order_M)
        # In the dtype that experts multiply in, which is what they return.
        sorted_MD = in_order(hidden_ND, order_M, inverse_M, choices).to(compute_dtype(hidden_ND))
        received_RD = all_to_all_single_autograd(sorted_MD, receive, send, group)
        mixed_RD = experts(_regroup(wait_tensor(received_RD), came), received_E.view(size, held).sum(dim=0))
        by_sender_RD = _regroup(mixed_RD, list(zip(*came, strict=True)))
        mixed_MD = all_to_all_single_autograd(by_sender_RD, send, receive, group)
        mixed_NTD = in_order(mixed_MD, inverse_M, order_M).view(tokens, choices, hidden_ND.shape[1])
        return (mixed_NTD * weights_NT[..., None]).sum(dim=1)

    return dispatch  # pyright: ignore[reportReturnType]


def _regroup(rows_RD: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Bring rows that lie in the order of (i, j), counts[i][j] of each, into that of (j, i).

    It goes by the host's counts, as the exchange does, so that the two cannot disagree (torchtitan issue 3336).
    """
    parts, width = rows_RD.split([count for row in counts for count in row]), len(counts[0])
    return torch.cat([part_RD for j in range(width) for part_RD in parts[j::width]])


def compute_in_place(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Have a mixture of experts that no other rank shares compute with its own tensors, without FSDP2's copies of them.

    To all else its parameters are DTensors on a mesh of one, as FSDP2's are.
    """
    shown: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = placed(parameter.detach(), mesh, (Shard(0),), parameter.shape)
            setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))

    def show(*_: object) -> None:
        for module in experts.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                shown.append((module, name, parameter))
                module._parameters[name] = parameter.to_local()  # pyright: ignore

    def hide(*_: object) -> None:
        for module, name, parameter in shown:
            module._parameters[name] = parameter
        shown.clear()

    experts.register_forward_pre_hook(show)
    experts.register_forward_hook(hide, always_call=True)  # checkpointing ends a recomputed pass with an exception


def placed(local: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size) -> DTensor:
    """Return a tensor as a part of a whole, sharing its memory; `from_local` copies offloaded ones to the device."""
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)  # pyright: ignore
