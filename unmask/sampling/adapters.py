"""What the denoising loop asks of a model family: `prefill` prompts, `denoise` answers, `commit` finished blocks.

Shapes: B rows, P prompt positions, C answer positions, L = P + C, M scored positions, D width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from unmask.errors import SamplingError
from unmask.sampling.settings import MaskSettings, SamplerConfig, Settings, default_settings, resolve

if TYPE_CHECKING:
    from unmask.models.llada.model import LLaDA


@dataclass(frozen=True)
class FamilySpec:
    """What the loop must know about a model.

    Attributes:
        noise: what stands at open positions: `mask`, or `uniform` random tokens; a key of `process.PROCESSES`.
        mask_id: the mask; None where there is none.
        banned_ids: tokens that never belong in an answer, the mask among them.
        eos_ids: the model's own end-of-text tokens.
        vocab_size: logits of rows from here on are padding.
        rows: ids that the model accepts are below this, and the head has as many.
        max_length: longest prompt and answer together, in tokens.
    """

    noise: Literal["mask", "uniform"]
    mask_id: int | None
    banned_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    vocab_size: int
    rows: int
    max_length: int


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, padded on the left so that every answer starts in the same column.

    Attributes:
        ids_BP: int64 (B, P); padding holds token 0, which nothing attends to.
        lengths: tokens of each prompt; kept on the host, so that asking for padding never waits for a device.
    """

    ids_BP: Tensor
    lengths: tuple[int, ...]

    def take(self, keep_B: Tensor) -> Prompts:
        """Return the rows where `keep_B` (bool, on the CPU) is True, without columns that are then padding in all."""
        lengths = tuple(length for length, keep in zip(self.lengths, keep_B.tolist(), strict=True) if keep)
        padding = self.ids_BP.shape[1] - max(lengths, default=0)
        return Prompts(self.ids_BP[keep_B.to(self.ids_BP.device)][:, padding:], lengths)

    def attend(self, answer_length: int) -> Tensor | None:
        """Return bool (B, P + answer_length), False at padding; None when there is no padding."""
        width = self.ids_BP.shape[1]
        if min(self.lengths) == width:
            return None
        starts_B = width - torch.tensor(self.lengths, device=self.ids_BP.device)
        return torch.arange(width + answer_length, device=self.ids_BP.device) >= starts_B[:, None]


class Adapter(Protocol):
    """One family's way to compute logits.

    The context is whatever `prefill` returns; the loop calls its `take(keep_B)`, and where the network conditions on
    its own predictions its `told(signal_MD)`.

    Attributes:
        spec: what the loop must know.
        device: where the network is.
    """

    spec: FamilySpec
    device: torch.device

    @property
    def signal(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """None, or what the network is told of a prediction in the next call of the block, (M, D).

        Arguments: (weights_MV, total_M); the probabilities are weights / total.
        """
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Take in the prompts and return the context that later calls need."""
        ...

    def denoise(self, context: Any, answer_BC: Tensor, rows_M: Tensor, positions_M: Tensor) -> Tensor:
        """Run the network once; return hidden states (M, …) at the answer positions (rows_M, positions_M)."""
        ...

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return logits (M, V) of some of the hidden states that `denoise` gave.

        They may be overwritten, and are valid until the next call.
        """
        ...

    def commit(self, context: Any, answer_BC: Tensor, block_B: Tensor, completed_B: Tensor) -> Any:
        """Return the context after rows with `completed_B` True have settled their block number `block_B`."""
        ...


class LLaDAAdapter:
    """LLaDA sees prompt and answer at once, in both directions, so every call is a full forward and nothing is kept.

    Args:
        model: the network.
        cfg_scale: s of classifier-free guidance, u + (s + 1)(c - u); 0 is off. The pair is one call of twice the rows.
    """

    signal = None

    def __init__(self, model: LLaDA, cfg_scale: float = 0.0) -> None:
        config = model.config
        self.model = model
        self.cfg_scale = cfg_scale
        self.device = next(model.parameters()).device
        padding = () if config.pad_token_id == config.eos_token_id else (config.pad_token_id,)
        self.spec = FamilySpec(
            noise="mask",
            mask_id=config.mask_token_id,
            banned_ids=(config.mask_token_id, *padding),
            eos_ids=(config.eos_token_id,),
            vocab_size=config.vocab_size,
            rows=config.rows,
            max_length=config.max_sequence_length,
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts:
        """Pad the prompts on the left; the network is not called."""
        lengths = tuple(len(prompt) for prompt in prompts)
        width = max(lengths)
        ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        ids_BP = torch.tensor(ids, dtype=torch.long).reshape(len(prompts), width)
        return Prompts(ids_BP.to(self.device), lengths)

    def denoise(self, context: Prompts, answer_BC: Tensor, rows_M: Tensor, positions_M: Tensor) -> Tensor:
        """Run a full forward; return (M, D), or with guidance (M, 2, D): with the prompt, and with it masked."""
        ids_BP, rows_M = context.ids_BP, rows_M.to(self.device)
        columns_M = positions_M.to(self.device) + ids_BP.shape[1]
        ids_BL = torch.cat((ids_BP, answer_BC.to(self.device)), dim=1)
        attend_BL = context.attend(answer_BC.shape[1])
        if not self.cfg_scale:
            return self._hidden(ids_BL, attend_BL)[rows_M, columns_M]
        blind_BL = ids_BL.clone()
        blind_BL[:, : ids_BP.shape[1]] = self.model.config.mask_token_id
        hidden_BLD = self._hidden(
            torch.cat((ids_BL, blind_BL)), None if attend_BL is None else torch.cat((attend_BL, attend_BL))
        )
        return torch.stack((hidden_BLD[rows_M, columns_M], hidden_BLD[rows_M + len(ids_BP), columns_M]), dim=1)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Return logits (M, V) in the model's dtype, guided where there are two hidden states a position."""
        if not self.cfg_scale:
            return self.model.logits(hidden_MD)
        conditional_MV, unconditional_MV = (self.model.logits(hidden) for hidden in hidden_MD.unbind(dim=1))
        return unconditional_MV + (self.cfg_scale + 1) * (conditional_MV - unconditional_MV)

    def commit(self, context: Prompts, answer_BC: Tensor, block_B: Tensor, completed_B: Tensor) -> Prompts:
        """Return the context as it is: hidden states change with every later token, so keeping any would be inexact."""
        return context

    def _hidden(self, ids_BL: Tensor, attend_BL: Tensor | None) -> Tensor:
        if attend_BL is None:
            return self.model(ids_BL)
        # Each row counts from its own first token, so that it computes what it would alone.
        return self.model(ids_BL, attention_mask=attend_BL, position_ids=(attend_BL.cumsum(dim=1) - 1).clamp(min=0))


def _llada(model: Any, settings: Settings) -> Adapter:
    assert isinstance(settings, MaskSettings)
    return LLaDAAdapter(model, settings.cfg_scale)


def _diffusion_gemma(model: Any, settings: Settings) -> Adapter:
    from unmask.sampling.canvas_adapter import CanvasAdapter

    return CanvasAdapter(model)


# Name of a configuration's class → (model, settings) → adapter.
ADAPTERS: dict[str, Callable[[Any, Settings], Adapter]] = {
    "LLaDAConfig": _llada,
    "DiffusionGemmaConfig": _diffusion_gemma,
}


def settings_for(model: nn.Module, sampler: SamplerConfig | None = None) -> Settings:
    """Return what a model is sampled with: its family's defaults, its checkpoint's, and then the caller's settings.

    Raises:
        SamplingError: a model of no family that can be sampled from, or a setting that its family does not have.
        ModelError: a bad value in the checkpoint's generation_config.json.
    """
    _family(model)
    return resolve(sampler, default_settings(model.config, getattr(model, "generation", {})))


def adapter_for(model: nn.Module, settings: Settings | None = None) -> Adapter:
    """Return the adapter for a model, found by the name of its configuration's class.

    Args:
        model: the network.
        settings: of the model's family; None = its defaults.

    Raises:
        SamplingError: a model of no family that can be sampled from.
    """
    return ADAPTERS[_family(model)](model, settings if settings is not None else settings_for(model))


def _family(model: nn.Module) -> str:
    name = type(getattr(model, "config", None)).__name__
    if name not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise SamplingError(
            f"cannot sample from a {type(model).__name__} with a {name}; load it with unmask.load_model ({known})"
        )
    return name
