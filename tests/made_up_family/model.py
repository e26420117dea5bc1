"""The made-up family's network: one head of attention without positions, and an MLP, a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from made_up_family.config import MadeUpConfig
from unmask.ops.head import Head


class Layer(nn.Module):
    """x + attention(x), then x + MLP(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden_BLD: Tensor, mask: Tensor | None) -> Tensor:
        """Return the layer's output, (B, L, D)."""
        q, k, v = (part[:, None] for part in self.qkv(self.norm(hidden_BLD)).chunk(3, dim=-1))
        hidden_BLD = hidden_BLD + F.scaled_dot_product_attention(q, k, v, mask)[:, 0]
        return hidden_BLD + self.down(F.relu(self.up(hidden_BLD)))


class MadeUp(nn.Module):
    """The network."""

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.rows, config.width)
        self.layers = nn.ModuleList(Layer(config.width) for _ in range(config.layers))
        self.out = nn.Linear(config.width, config.rows)

    @property
    def head(self) -> Head:
        """The output head."""
        return Head(self.out.weight, self.out.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return hidden states (B, L, D)."""
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()
            mask = mask[:, None, None] if mask.dim() == 2 else mask
        hidden_BLD = self.embed(input_ids)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, mask)
        return hidden_BLD

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        return self.head.logits(hidden)


def initialise(model: MadeUp, generator: torch.Generator) -> None:
    """Draw fresh weights in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0, 0.1, generator=generator)
