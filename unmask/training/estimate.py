"""What a training step holds, and what each of several ranks holds and receives, counted from sizes.

The arithmetic is that of docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from unmask.config import RunConfig
from unmask.distributed.processes import Degrees, experts_in_place
from unmask.distributed.runtime import pick_device
from unmask.models.family import ShardPlan
from unmask.models.lora.quantized import packed_elements, packed_tensors
from unmask.models.registry import ModelPlan
from unmask.ops.chunks import working_bytes
from unmask.ops.head import Head
from unmask.training.optim import held_bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step on one device, and counts of parameters.

    Attributes:
        weights: the network's, adapters among them.
        head: the head's gradient that the loss holds until the backward pass; see `head_gradients`.
        optimizer: AdamW's two moments, and the fp32 masters of bf16 weights.
        activations: what one micro-batch of full length keeps for backward, the loss's chunk of logits included.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    head: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.head + self.optimizer + self.activations


def estimate_memory(config: RunConfig, plan: ModelPlan, model: nn.Module) -> Estimate:
    """Count the memory of a training step; `model` is on the meta device, in its dtypes, adapters attached."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    width = 4 if config.model.torch_dtype == "float32" else 2
    held = [(p.numel(), held_bytes(config.optimizer, p.dtype)) for p in trainable]
    tokens = config.step_scheduler.local_batch_size * config.dataset.seq_length
    compute = 2 if config.distributed.autocast_dtype == "bfloat16" else width
    activations = plan.family.activation_bytes(
        plan.config, tokens, width, compute, config.distributed.activation_checkpointing
    )
    accumulated = config.step_scheduler.global_batch_size > config.step_scheduler.local_batch_size
    on_cpu = pick_device(config.distributed.device).type == "cpu"
    chunks = 1 if on_cpu or model.head.softcap is None else 2  # pyright: ignore[reportAttributeAccessIssue]
    return Estimate(
        parameters=sum(p.numel() for p in parameters) + packed_elements(model),
        trainable=sum(p.numel() for p in trainable),
        weights=_bytes(parameters) + sum(packed.nbytes for packed in packed_tensors(model).values()),
        gradients=sum(elements * gradient for elements, (gradient, _) in held),
        head=head_gradients(model, width, accumulated),
        optimizer=sum(elements * state for elements, (_, state) in held),
        activations=activations + working_bytes(tokens, plan.config.rows, compute, chunks),
    )


def head_gradients(model: nn.Module, width: int, accumulated: bool) -> int:
    """Return the bytes of the head's gradients that a micro-batch holds, without those of the ones before it.

    The loss computes it in its forward pass, in fp32, and keeps it in the head's dtype, of `width` bytes a number. Of a
    head that is the embedding, the lookup's gradient is made beside it before both are added to what is `accumulated`.
    """
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    elements = sum(p.numel() for p in (head.weight, head.bias) if p is not None and p.requires_grad)
    tied = any(isinstance(module, nn.Embedding) and module.weight is head.weight for module in model.modules())
    return elements * (width + (4 if width < 4 or (tied and accumulated) else 0))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@dataclass(frozen=True)
class SharedEstimate:
    """Bytes of a training step on one of several ranks.

    Attributes:
        weights, optimizer: a shard.
        gradients: a shard, and the whole until the last micro-batch where their sum over ranks is deferred.
        head, activations: as on one device.
        gathered: the root's group and two blocks, the one that runs and the one that is fetched for it, or all blocks
            where they stay gathered; without experts that are computed in place.
        weights_received: shards of the others, gathered for every pass.
        gradients_received: parts of sums over ranks.
        tokens_received: rows of hidden states that travel to experts and back.
    """

    weights: int
    gradients: int
    head: int
    optimizer: int
    gathered: int
    activations: int
    weights_received: int
    gradients_received: int
    tokens_received: int

    @property
    def total(self) -> int:
        """Bytes held in all."""
        return self.weights + self.gradients + self.head + self.optimizer + self.gathered + self.activations

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


def estimate_shared(
    config: RunConfig, plan: ModelPlan, model: nn.Module, whole: Estimate, degrees: Degrees
) -> SharedEstimate:
    """Count a step of one rank; a global batch of `accumulation` micro-batches a rank.

    A tensor of n bytes that s ranks share is gathered by receiving n (s − 1) / s, and its gradient summed by receiving
    as much; r copies then sum their shards, 2 n/s (r − 1) / r. Every block is gathered for each pass, forward and
    backward, and the root's group once a micro-batch; gradients of blocks are summed after each of their backward
    passes. `whole` is `estimate_memory`'s result, for one device.
    """
    passes = plan.family.shard
    groups = count_groups(model, passes)
    section, steps = config.distributed, config.step_scheduler
    policy = section.mp_policy
    travels = config.model.torch_dtype if policy is None else policy.param_dtype or config.model.torch_dtype
    travel = {"float32": 4, "bfloat16": 2}[travels]
    reduce = 4 if policy is None or policy.reduce_dtype == "float32" else 2
    accumulation = steps.global_batch_size // (steps.local_batch_size * degrees.world)
    shard, spread, experts = degrees.shard, degrees.spread, degrees.experts
    deferred = section.defer_grad_sync and accumulation > 1
    trained = groups.trained_root + groups.trained_blocks + groups.trained_experts // experts
    # What stays gathered after the first forward pass is gathered again for further backward passes alone.
    runs, kept_runs = passes.forward_passes + passes.backward_passes, passes.backward_passes
    keeps, keeps_experts = not section.reshard_after_forward, not section.reshard_experts_after_forward
    keeps_experts = keeps if experts == 1 else keeps_experts
    at_once = min(2, groups.layers) / groups.layers
    in_memory = groups.root + groups.blocks * (1 if keeps else at_once)
    if not experts_in_place(section, degrees):
        in_memory += groups.experts // experts * (1 if keeps_experts else at_once)
    gathered = _others(groups.blocks, shard) * (kept_runs if keeps else runs) + _others(groups.root, shard)
    gathered += _others(groups.experts // experts, spread) * (kept_runs if keeps_experts else runs)
    dense = groups.trained_root + groups.trained_blocks
    in_blocks = _others(groups.trained_blocks, shard) + _others(groups.trained_experts // experts, spread)
    once = _others(groups.trained_root, shard) + in_blocks * passes.backward_passes
    copies = 2 * (dense + groups.trained_experts) // shard * (degrees.replicate - 1) // degrees.replicate
    sums = 1 if deferred else accumulation
    return SharedEstimate(
        weights=whole.weights // shard,
        gradients=whole.gradients // shard + (reduce * trained if deferred else 0),
        head=head_gradients(model, travel, deferred),
        optimizer=whole.optimizer // shard,
        gathered=int(travel * in_memory),
        activations=whole.activations,
        weights_received=travel * gathered * accumulation,
        gradients_received=reduce * (once + copies) * sums,
        tokens_received=accumulation * _tokens(config, plan, degrees, groups.layers),
    )


def _others(elements: int, ranks: int) -> int:
    return elements * (ranks - 1) // ranks


def _tokens(config: RunConfig, plan: ModelPlan, degrees: Degrees, layers: int) -> int:
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
    width = 2 if config.distributed.autocast_dtype == "bfloat16" else 4
    pairs = both_ways * model.top_k_experts * layers
    return pairs * model.hidden_size * width * (degrees.experts - 1) // degrees.experts
