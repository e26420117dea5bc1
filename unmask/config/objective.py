"""The training objective (`dllm`): which one, and its options. `unmask.objectives.registry` builds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from unmask.errors import FieldError, choice_problem

# dllm.mode → the fields that it takes, with their defaults; any other field is refused.
MODES: dict[str, Mapping[str, Any]] = {
    "mdlm": {
        "eps": 1e-3,
        "mask_token_id": None,
        "supervise_padding": False,
        "normalization": "token",
        "time_sampling": "iid",
    },
    "block_diffusion": {
        "eps": 1e-3,
        "block_size": None,
        "vocab_size": None,
        "encoder_loss_weight": 1.0,
        "self_conditioning_p": 0.5,
        "freeze_router": True,
        "stop_gradient_to_encoder": False,
        "time_sampling": "iid",
    },
}

# The values of dllm.mode in NeMo AutoModel 0.7.0.
AUTOMODEL_MODES = ("mdlm", "scdd", "hybrid", "idlm", "dflash", "block_diffusion")


def mode_problem(mode: object) -> str | None:
    """Say why a value of dllm.mode names no objective of ours, and which are; None where it names one."""
    if mode in MODES:
        return None
    if str(mode).lower() in AUTOMODEL_MODES and str(mode).lower() not in MODES:
        return f"{mode!r} is a mode of NeMo AutoModel that is not implemented here; set {' or '.join(MODES)}"
    return choice_problem(mode, MODES)


@dataclass(frozen=True)
class DllmConfig:
    """Section `dllm`: the objective. A field that the chosen mode does not take is refused.

    Attributes:
        mode: name of the objective: `mdlm` for networks with a mask token, `block_diffusion` for those with canvases
        eps: smallest corruption level, between 0 and 1; null is 0.001
        time_sampling: draw each level by itself (null too), or spread the levels of a global batch evenly
        mask_token_id: mdlm: checked against the model, which knows it; may be left out
        supervise_padding: mdlm: pad rows with EOS that is attended, corrupted and supervised; teaches the model to
            stop; null is false. In block diffusion the rest of an answer's last canvas always is
        normalization: mdlm: divide by the supervised tokens of the global batch (null too), or each row by its
            answer's length and the whole by the rows
        block_size: block_diffusion: checked against the model's canvas length; may be left out
        vocab_size: block_diffusion: checked against the model; may be left out
        encoder_loss_weight: block_diffusion: weight of the encoder's next-token loss, at least 0; null is 1
        self_conditioning_p: block_diffusion: share of examples that see their own first prediction, in [0, 1]; null is
            0.5
        freeze_router: block_diffusion: projection and scale of the routers are not trained; null is true
        stop_gradient_to_encoder: block_diffusion: the denoising loss does not train the encoder through its keys and
            values; null is false
    """

    mode: str = "mdlm"
    eps: float | None = None
    time_sampling: Literal["iid", "stratified"] | None = None
    mask_token_id: int | None = None
    supervise_padding: bool | None = None
    normalization: Literal["token", "sequence"] | None = None
    block_size: int | None = None
    vocab_size: int | None = None
    encoder_loss_weight: float | None = None
    self_conditioning_p: float | None = None
    freeze_router: bool | None = None
    stop_gradient_to_encoder: bool | None = None

    def __post_init__(self) -> None:
        problem = mode_problem(self.mode)
        if problem is not None:
            raise FieldError("mode", problem)
        defaults = MODES[self.mode]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "mode":
                continue
            if item.name not in defaults and value is not None:
                takers = ", ".join(mode for mode, taken in MODES.items() if item.name in taken)
                raise FieldError(
                    item.name, f"{value!r} has no meaning for mode {self.mode}; leave it out (it belongs to {takers})"
                )
            if value is None:
                object.__setattr__(self, item.name, defaults.get(item.name))
        self._check_ranges()

    def _check_ranges(self) -> None:
        if self.eps is not None and not 0 < self.eps < 1:
            raise FieldError("eps", f"must lie between 0 and 1, got {self.eps}")
        if self.mask_token_id is not None and self.mask_token_id < 0:
            raise FieldError("mask_token_id", f"must not be negative, got {self.mask_token_id}")
        if self.encoder_loss_weight is not None and not 0 <= self.encoder_loss_weight < math.inf:
            raise FieldError("encoder_loss_weight", f"must be at least 0, got {self.encoder_loss_weight}")
        if self.self_conditioning_p is not None and not 0 <= self.self_conditioning_p <= 1:
            raise FieldError("self_conditioning_p", f"must lie in [0, 1], got {self.self_conditioning_p}")
