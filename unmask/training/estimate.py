"""How much memory a run will take, counted from its sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from unmask.config import RunConfig
from unmask.distributed.runtime import pick_device
from unmask.models.registry import ModelPlan
from unmask.ops.chunks import working_bytes
from unmask.ops.head import Head


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step on one device, and counts of parameters.

    Attributes:
        parameters, trainable: how many, and how many of them are trained.
        weights: the master weights, adapters among them.
        gradients: one a trained parameter.
        head: the head's gradient that the loss holds until the backward pass.
        optimizer: AdamW's two moments.
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
    """Count the memory of a training step.

    Args:
        config: the run.
        plan: the model's plan.
        model: its network, on the meta device, in its dtypes, adapters attached.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    width = 4 if config.model.torch_dtype == "float32" else 2
    trained_bytes = _bytes(trainable)
    tokens = config.step_scheduler.local_batch_size * config.dataset.seq_length
    compute = 2 if config.distributed.autocast_dtype == "bfloat16" else width
    activations = plan.family.activation_bytes(
        plan.config, tokens, width, compute, config.distributed.activation_checkpointing
    )
    head = head_gradients(model, width)
    on_cpu = pick_device(config.distributed.device).type == "cpu"
    chunks = 1 if on_cpu or model.head.softcap is None else 2  # pyright: ignore[reportAttributeAccessIssue]
    return Estimate(
        parameters=sum(p.numel() * _packed(p) for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        weights=_bytes(parameters),
        gradients=trained_bytes,
        head=head,
        optimizer=2 * trained_bytes,
        activations=activations + working_bytes(tokens, plan.config.rows, compute, chunks),
    )


def head_gradients(model: nn.Module, width: int) -> int:
    """Return the bytes of the head's gradients that a micro-batch's loss holds beside those of the ones before it.

    The loss computes it in its forward pass, in fp32, and keeps it in the head's dtype.

    Args:
        model: the network, on the meta device.
        width: bytes of an element of the head.
    """
    head: Head = model.head  # pyright: ignore[reportAssignmentType]
    elements = sum(p.numel() for p in (head.weight, head.bias) if p is not None and p.requires_grad)
    return elements * (width + (4 if width < 4 else 0))


def _packed(parameter: nn.Parameter) -> int:
    """How many parameters an element stands for: two where a frozen base is in 4 bits."""
    return 2 if parameter.dtype == torch.uint8 else 1


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
