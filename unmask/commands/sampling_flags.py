"""Flags that say how an answer is sampled, one for each field of `SamplerConfig`, for every command that samples."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from unmask.commands.flags import flag

if TYPE_CHECKING:
    from unmask.sampling.settings import SamplerConfig


def add_sampling_flags(parser: Any) -> None:
    """Declare the flags; none has a default, so that what is not given is left to the model."""
    flag(
        parser,
        "preset",
        help="reference (the published sampler), balanced or fast (fewer calls; LLaDA's with an approximate cache); "
        "other flags win over it",
    )
    flag(parser, "steps", type=int, help="denoising steps (LLaDA 128 an answer, DiffusionGemma 48 a canvas)")
    flag(
        parser,
        "max_new_tokens",
        type=int,
        help="longest answer (LLaDA 128, DiffusionGemma 256; at most half the context)",
    )
    flag(parser, "eos", help="end-of-text token: allow (default), suppress or (LLaDA) defer")
    flag(
        parser,
        "entropy_bound",
        type=float,
        help="settle tokens by rising entropy while those before have at most this much, in nats (DiffusionGemma 0.1)",
    )
    flag(parser, "cache", help="none (LLaDA), prefix or dual (LLaDA, approximate), block (DiffusionGemma, exact)")
    flag(parser, "revise", help="none (default), remask or edit (LLaDA); redraw (DiffusionGemma)")
    llada = parser.add_argument_group("LLaDA")
    flag(llada, "block_size", type=int, help="tokens of a denoising block (32)")
    flag(llada, "temperature", type=float, help="Gumbel noise; 0 is greedy (0)")
    flag(llada, "remasking", help="low_confidence (default), entropy, margin, random or left_to_right")
    flag(llada, "threshold", type=float, help="settle all tokens with at least this confidence; steps is then unused")
    flag(llada, "factor", type=float, help="settle r tokens while the r-th has at least 1 - factor/(r + 1)")
    flag(llada, "cfg_scale", type=float, help="classifier-free guidance (0, off)")
    flag(llada, "refresh_interval", type=int, help="calls after which a cache is computed anew (at block starts only)")
    flag(llada, "revise_threshold", type=float, help="probability that revising goes by (0.9)")
    gemma = parser.add_argument_group("DiffusionGemma (in brackets: where generation_config.json has nothing)")
    flag(gemma, "t_min", type=float, help="temperature towards a canvas's last step (0.4)")
    flag(gemma, "t_max", type=float, help="temperature of a canvas's first step (0.8)")
    flag(gemma, "stability_threshold", type=int, help="steps without change before a canvas may stop early (1)")
    flag(gemma, "confidence_threshold", type=float, help="mean entropy below which it then stops, in nats (0.005)")


def sampler_from(arguments: argparse.Namespace) -> SamplerConfig:
    """Return the settings that were given.

    Raises:
        SamplingError: a value outside its range, or two that exclude each other.
    """
    from unmask.sampling.settings import SamplerConfig

    names = [field.name for field in dataclasses.fields(SamplerConfig)]
    return SamplerConfig(**{name: getattr(arguments, name) for name in names})
