"""What a training step holds on its device, and what each of several ranks holds and receives, counted from sizes.

The arithmetic is that of docs/distributed.md. All that may be held at one time or another is added up, so the sum is an
upper bound; the allocator's waste is not in it. What the host and the disk need is counted in `needs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from unmask.config import RunConfig
from unmask.distributed.processes import Degrees, experts_in_place
from unmask.distributed.runtime import autocast_dtype, pick_device
from unmask.models.experts import Experts, freeze_routers
from unmask.models.family import ShardPlan
from unmask.models.loading import empty_network
from unmask.models.lora.quantized import packed_elements, packed_tensors
from unmask.models.registry import ModelPlan
from unmask.ops.chunks import working_bytes
from unmask.ops.head import Head
from unmask.training.lora import attach
from unmask.training.optim import held_bytes

# Assumed, not counted. A process's CUDA context with the kernels that it loads, as the Hugging Face documentation
# measured it ("Model training anatomy": 1343 MB after one small tensor).
CONTEXT_BYTES = 1343 * 2**20
# A communicator's buffers: 4 MiB (NCCL_BUFFSIZE's default) for each of up to 32 channels, to send and to receive (NCCL
# user guide, "Environment Variables"). Each process group that has sent something on the device has one.
NCCL_BYTES = 2 * 32 * 4 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step on one device, and counts of parameters.

    Attributes:
        weights: the network's, adapters among them.
        casts: copies of weights in the dtype that matmuls run in; see `cast_copies`.
        head: the head's gradient that the loss holds until the backward pass, or the embedding's that a lookup makes
            at its end, whichever is more; see `head_gradients`.
        optimizer: AdamW's two moments, and the fp32 masters of bf16 weights.
        activations: what one micro-batch of full length keeps for backward, the loss's chunk of logits included.
        context: what CUDA takes for itself; an assumption.
    """

    parameters: int
    trainable: int
    weights: int
    casts: int
    gradients: int
    head: int
    optimizer: int
    activations: int
    context: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(getattr(self, name) for name in _HELD) + self.context


_HELD = ("weights", "casts", "gradients", "head", "optimizer", "activations")


def network_to_count(config: RunConfig, plan: ModelPlan) -> nn.Module:
    """Return the network of a run on the meta device, in its dtype and with what it trains, to be counted."""
    with torch.device("meta"):
        model = empty_network(plan.family, plan.config).to(getattr(torch, config.model.torch_dtype))
        if config.peft is not None:
            attach(model, config.peft, "")
        if config.dllm.freeze_router:
            freeze_routers(model)
    return model


def estimate_memory(
    config: RunConfig, plan: ModelPlan, model: nn.Module, device: torch.device | None = None
) -> Estimate:
    """Count the memory of a training step; `model` is on the meta device, in its dtypes, adapters attached.

    `device` is where it would run, this machine's own by default.
    """
    device = device or pick_device(config.distributed.device)
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    width = 4 if config.model.torch_dtype == "float32" else 2
    held = [(p.numel(), held_bytes(config.optimizer, p.dtype)) for p in trainable]
    tokens = config.step_scheduler.local_batch_size * config.dataset.seq_length
    narrow = autocast_dtype(config.distributed, device) == torch.bfloat16
    compute = 2 if narrow else width
    activations = plan.family.activation_bytes(
        plan.config, tokens, width, compute, config.distributed.activation_checkpointing
    )
    accumulated = config.step_scheduler.global_batch_size > config.step_scheduler.local_batch_size
    on_cpu = device.type == "cpu"
    chunks = 1 if on_cpu or model.head.softcap is None else 2  # pyright: ignore[reportAttributeAccessIssue]
    return Estimate(
        parameters=sum(p.numel() for p in parameters) + packed_elements(model),
        trainable=sum(p.numel() for p in trainable),
        weights=_bytes(parameters) + sum(packed.nbytes for packed in packed_tensors(model).values()),
        casts=cast_copies(model, plan.family.shard, narrow, config.distributed.activation_checkpointing),
        gradients=sum(elements * gradient for elements, (gradient, _) in held),
        head=head_gradients(model, width, accumulated),
        optimizer=sum(elements * state for elements, (_, state) in held),
        activations=activations + working_bytes(tokens, plan.config.rows, compute, chunks),
        context=0 if on_cpu else CONTEXT_BYTES,
    )


def cast_copies(
    model: nn.Module, plan: ShardPlan, narrow: bool, checkpointing: bool, ranks: int = 1, only: type | None = None
) -> int:
    """Return the bytes of weights that are held once more, in the dtype that matmuls run in.

    Under autocast (`narrow`) an fp32 weight that is trained has a bf16 copy from its first use to the end of the
    forward pass (torch keeps it for the next use); one that is frozen, and any expert's, has one for each forward pass
    that autograd follows, kept for the backward pass. With activation checkpointing those of the latter kinds live with
    their block alone, one at a time. A weight in 4 bits is unpacked for each product.

    `ranks` share out the experts; `only` modules of a class count, None = all.
    """
    kept, passing, blocks = 0, 0, dict.fromkeys(range(len(list(model.get_submodule(plan.blocks).children()))), 0)
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    routers = {name for name, module in model.named_modules() if hasattr(module, "freeze_routing")}
    for name, module in model.named_modules():
        if not isinstance(module, only or (nn.Linear, Experts)) or name.rpartition(".")[0] in routers:
            continue  # a router multiplies in fp32
        for parameter in module.parameters(recurse=False):
            if not narrow or parameter.dtype != torch.float32 or parameter is head.weight or parameter is head.bias:
                continue
            size = 2 * parameter.numel() // (ranks if isinstance(module, Experts) else 1)
            if parameter.requires_grad and isinstance(module, nn.Linear):
                kept += size
                continue
            passing += size
            if name.startswith(plan.blocks + "."):
                blocks[int(name.removeprefix(plan.blocks + ".").partition(".")[0])] += size
    held = kept + (max(blocks.values()) if checkpointing else passing * plan.backward_passes)
    whole = [
        p.shape.numel() * (p.dtype.itemsize + 2 * (narrow and p.dtype.itemsize > 2))
        for p in packed_tensors(model).values()
    ]
    return held + max(whole, default=0)


def head_gradients(model: nn.Module, width: int, accumulated: bool) -> int:
    """Return the bytes of the head's and lookups' gradients that a micro-batch holds, without those of others.

    The loss computes it in its forward pass, in fp32, and keeps it in the head's dtype, of `width` bytes a number. Of a
    head that is the embedding, the lookup's gradient is made beside it before both are added to what is `accumulated`.
    Of an embedding apart from the head, the lookup's is made when the head's has been added.
    """
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    elements = sum(p.numel() for p in (head.weight, head.bias) if p is not None and p.requires_grad)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tied = any(weight is head.weight for weight in embeddings)
    lookup = sum(weight.numel() for weight in embeddings if weight.requires_grad and weight is not head.weight)
    apart = lookup * width if accumulated or width < 4 else 0  # otherwise it is the gradient itself
    return max(apart, elements * (width + (4 if width < 4 or (tied and accumulated) else 0)))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@dataclass(frozen=True)
class SharedEstimate:
    """Bytes of a training step on one of several ranks.

    Attributes:
        weights, optimizer: a shard.
        casts: as on one device, but for weights that are gathered in bf16: of the whole network, not of a shard.
        gradients: a shard, and the whole until the last micro-batch where their sum over ranks is deferred.
        head, activations: as on one device.
        gathered: the root's group and two blocks, the one that runs and the one that is fetched for it, or all blocks
            where they stay gathered; without experts that are computed in place.
        buffers: the largest that a collective works in, beside what it fills or empties; see `largest_buffer`.
        context: what CUDA and NCCL take for themselves; an assumption.
        offloaded: how much of weights, gradients and optimizer is in host memory (`offload_policy`).
        weights_received: shards of the others, gathered for every pass.
        gradients_received: parts of sums over ranks.
        tokens_received: rows of hidden states that travel to experts and back.
    """

    weights: int
    casts: int
    gradients: int
    head: int
    optimizer: int
    gathered: int
    buffers: int
    activations: int
    context: int
    offloaded: int
    weights_received: int
    gradients_received: int
    tokens_received: int

    @property
    def total(self) -> int:
        """Bytes held on the device in all."""
        held = sum(getattr(self, name) for name in (*_HELD, "gathered", "buffers", "context"))
        return held - self.offloaded

    @property
    def received(self) -> int:
        """Bytes received in all."""
        return self.weights_received + self.gradients_received + self.tokens_received


@dataclass(frozen=True)
class Groups:
    """Elements of a network by how they travel: outside blocks, in all blocks without experts, in all experts."""

    root: int
    blocks: int
    experts: int
    trained_root: int
    trained_blocks: int
    trained_experts: int
    layers: int


def count_groups(model: nn.Module, plan: ShardPlan) -> Groups:
    """Count a network's parameters by group; on any device, the meta device included."""
    counts = dict.fromkeys(("root", "blocks", "experts"), 0)
    trained = dict(counts)
    for name, parameter in model.named_parameters():
        group = "root"
        if name.startswith(plan.blocks + "."):
            group = "experts" if plan.experts and f".{plan.experts}." in name else "blocks"
        counts[group] += parameter.numel()
        trained[group] += parameter.numel() if parameter.requires_grad else 0
    layers = len(list(model.get_submodule(plan.blocks).children()))
    return Groups(**counts, **{f"trained_{group}": number for group, number in trained.items()}, layers=layers)


def largest_buffer(groups: Groups, experts: int, travel: int, reduce: int) -> int:
    """Return the bytes of the largest buffer of a collective: a group gathered, or its gradients before their sum.

    FSDP2 gathers a group into one buffer, from which it copies the weights, and copies its gradients into one, in the
    dtype of the sum. Experts of a block are a group of their own where `experts` > 1 ranks share them out, and 0 says
    that they are in none.
    """
    share = max(1, experts)
    held, trained = [groups.blocks, groups.experts // share], [groups.trained_blocks, groups.trained_experts // share]
    if experts == 1:
        held, trained = [sum(held)], [sum(trained)]
    if experts == 0:
        held, trained = held[:1], trained[:1]
    return max(
        *(travel * elements for elements in (groups.root, *(each // groups.layers for each in held))),
        *(reduce * elements for elements in (groups.trained_root, *(each // groups.layers for each in trained))),
    )


def estimate_shared(
    config: RunConfig,
    plan: ModelPlan,
    model: nn.Module,
    whole: Estimate,
    degrees: Degrees,
    device: torch.device | None = None,
) -> SharedEstimate:
    """Count a step of one rank; a global batch of `accumulation` micro-batches a rank.

    A tensor of n bytes that s ranks share is gathered by receiving n (s − 1) / s, and its gradient summed by receiving
    as much; r copies then sum their shards, 2 n/s (r − 1) / r. Every block is gathered for each pass, forward and
    backward, and the root's group once a micro-batch; gradients of blocks are summed after each of their backward
    passes. `whole` is `estimate_memory`'s result, for one device of the kind of `device`.
    """
    passes = plan.family.shard
    narrow = autocast_dtype(config.distributed, device or pick_device(config.distributed.device)) == torch.bfloat16
    groups = count_groups(model, passes)
    section, steps = config.distributed, config.step_scheduler
    policy = section.mp_policy
    travels = config.model.torch_dtype if policy is None else policy.param_dtype or config.model.torch_dtype
    travel = {"float32": 4, "bfloat16": 2}[travels]
    reduce = 4 if policy is None or policy.reduce_dtype == "float32" else 2
    accumulation = steps.global_batch_size // (steps.local_batch_size * degrees.world)
    shard, spread, experts = degrees.shard, degrees.spread, degrees.experts
    deferred = section.defer_grad_sync and accumulation > 1
    # What stays gathered after the first forward pass is gathered again for further backward passes alone.
    runs, kept_runs = passes.forward_passes + passes.backward_passes, passes.backward_passes
    keeps, keeps_experts = not section.reshard_after_forward, not section.reshard_experts_after_forward
    keeps_experts = keeps if experts == 1 else keeps_experts
    at_once = min(2, groups.layers) / groups.layers
    in_memory = groups.root + groups.blocks * (1 if keeps else at_once)
    in_place = experts_in_place(section, degrees)  # their gradients too, which are summed as they are made
    trained = groups.trained_root + groups.trained_blocks + (0 if in_place else groups.trained_experts // experts)
    if not in_place:
        in_memory += groups.experts // experts * (1 if keeps_experts else at_once)
    gathered = _others(groups.blocks, shard) * (kept_runs if keeps else runs) + _others(groups.root, shard)
    gathered += _others(groups.experts // experts, spread) * (kept_runs if keeps_experts else runs)
    dense = groups.trained_root + groups.trained_blocks
    in_blocks = _others(groups.trained_blocks, shard) + _others(groups.trained_experts // experts, spread)
    once = _others(groups.trained_root, shard) + in_blocks * passes.backward_passes
    copies = 2 * (dense + groups.trained_experts) // shard * (degrees.replicate - 1) // degrees.replicate
    sums = 1 if deferred else accumulation
    casts = 0  # what is gathered in bf16 is multiplied as it is; experts in place are as they are stored
    if travel == 4 or in_place:
        counted = Experts if travel == 2 else None
        casts = cast_copies(model, passes, narrow, section.activation_checkpointing, experts, counted)
    kept = (whole.weights + whole.gradients + whole.optimizer) // shard
    communicators = 2 + (degrees.replicate > 1) + 2 * (experts > 1)  # all ranks', the shards', copies', experts'
    return SharedEstimate(
        weights=whole.weights // shard,
        casts=casts,
        gradients=whole.gradients // shard + (reduce * trained if deferred else 0),
        head=head_gradients(model, travel, deferred),
        optimizer=whole.optimizer // shard,
        gathered=int(travel * in_memory),
        buffers=largest_buffer(groups, 0 if in_place else experts, travel, reduce),
        activations=whole.activations,
        context=whole.context and whole.context + NCCL_BYTES * communicators,
        offloaded=0 if section.offload_policy is None else kept,
        weights_received=travel * gathered * accumulation,
        gradients_received=reduce * (once + copies) * sums,
        tokens_received=accumulation * _tokens(config, plan, degrees, groups.layers, 2 if narrow else 4),
    )


def _others(elements: int, ranks: int) -> int:
    return elements * (ranks - 1) // ranks


def _tokens(config: RunConfig, plan: ModelPlan, degrees: Degrees, layers: int, width: int) -> int:
    """Count the rows that a rank receives for its experts and back from others, in one micro-batch.

    With experts chosen evenly, (P − 1)/P of the pairs leave their rank; each travels there and back, and so does its
    gradient; activation checkpointing sends it once more. Encoder and decoder together are taken as in
    `activation_bytes`, a canvas being a quarter of its row.
    """
    if degrees.experts == 1:
        return 0
    model, passes = plan.config, plan.family.shard
    tokens = config.step_scheduler.local_batch_size * config.dataset.seq_length
    seen = tokens + (passes.forward_passes - 1) * tokens // 4
    again = tokens + (passes.backward_passes - 1) * tokens // 4
    both_ways = 2 * seen + 2 * again + (2 * again if config.distributed.activation_checkpointing else 0)
    pairs = both_ways * model.top_k_experts * layers
    return pairs * model.hidden_size * width * (degrees.experts - 1) // degrees.experts
