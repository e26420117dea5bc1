"""What is trained: the network (`model`), or a low-rank adapter beside it (`peft`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unmask.errors import FieldError


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`: which network to train.

    Attributes:
        pretrained_model_name_or_path: a local folder, a run directory (its `latest` checkpoint) or a hub id
        config: a fresh network instead: the fields of a `config.json` inline, or the path of one; `model_type` chooses
            the family
        torch_dtype: dtype in which the weights are held, multiplied and saved; what is trained in bfloat16 has an fp32
            master copy in the optimizer, unless `optimizer.stochastic_rounding` does without
    """

    pretrained_model_name_or_path: str | None = None
    config: dict[str, Any] | str | None = None
    torch_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.pretrained_model_name_or_path is None) == (self.config is None):
            raise FieldError(
                "pretrained_model_name_or_path",
                "set either this (a folder or hub id) or model.config (a fresh network), and not both",
            )


@dataclass(frozen=True)
class PeftConfig:
    """Section `peft`: train LoRA (Hu et al. 2021, arXiv 2106.09685) instead of the model; names as in PEFT.

    Patterns are globs over full names (`*` matches anything); a name's last parts alone are enough, as in PEFT.

    Attributes:
        r: rank
        lora_alpha: the update is scaled by `lora_alpha / r`
        lora_dropout: dropout on the adapter's input, in [0, 1)
        target_modules: patterns of linear layers, for example `*.q_proj`; null takes attention and dense MLP of every
            layer; `[]` none; head, embedding and router are never adapted
        exclude_modules: patterns of linear layers that are left out again
        target_parameters: patterns of stacked expert matrices, for example `*.experts.down_proj`; null adapts no
            experts
        modules_to_save: patterns of modules that are trained whole beside the adapter, for example `*norm`
        use_rslora: scale by `lora_alpha / √r` (Kalajdzievski 2023, arXiv 2312.03732)
        use_dora: learn the magnitude of each output apart from its direction (Liu et al. 2024, arXiv 2402.09353); not
            for experts
        load_in_4bit: keep the frozen linear layers and experts in 4-bit NF4 (QLoRA, arXiv 2305.14314); needs
            `unmask[quant]`
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise FieldError("r", f"must be at least 1, got {self.r}")
        if self.lora_alpha <= 0:
            raise FieldError("lora_alpha", f"must be positive, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise FieldError("lora_dropout", f"must lie in [0, 1), got {self.lora_dropout}")
        if self.target_parameters and self.use_dora:
            raise FieldError("use_dora", "experts take plain or rank-stabilised LoRA; remove it or target_parameters")
        if self.target_parameters and self.lora_dropout:
            raise FieldError("lora_dropout", "experts take no dropout; set it to 0 or remove target_parameters")
        if self.target_modules == [] and not self.target_parameters:
            raise FieldError("target_modules", "[] adapts nothing; name layers, or experts in target_parameters")
