"""Each family's settings, with their defaults: what the denoising loop goes by. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from unmask.config.sampler import Cache, Eos, Remasking, Revise, check_rule
from unmask.errors import SamplingError

Attention = Literal["bidirectional", "block_causal"]

# How a network attends → the caches that this permits. Where every position sees all others, whatever is kept changes
# with every token; where a block sees itself and what is settled before it, finished blocks never change.
CACHES: dict[str, tuple[Cache, ...]] = {
    "bidirectional": ("none", "prefix", "dual"),
    "block_causal": ("block", "none"),
}


@dataclass(frozen=True)
class MaskSettings:
    """LLaDA's sampler (Nie et al. 2025, appendix A.3; ML-GSAI/LLaDA, generate.py). Defaults are the published ones.

    Attributes:
        steps: network calls for the whole answer; shared out over the blocks, at least one each. Used where no other
            rule is set: `threshold`, `factor` or `entropy_bound`, at most one.
        max_new_tokens: length of the answer; the default of a model with a short context is less (`mask_defaults`).
        block_size: the answer is denoised in blocks of this length from left to right; the last may be shorter.
        temperature: 0 takes the most likely token; T > 0 samples from softmax(logits / T).
        remasking: which open positions are settled first: `low_confidence` those with the most probable token (the
            others stay masked), `entropy` those with the least entropy, `margin` those whose two most probable tokens
            are furthest apart, `random` any, `left_to_right`.
        threshold: settle every open position of the block whose score is at least this, and always one. Above 1 it is
            one token a step, 0 one step a block. Scores must be probabilities: `low_confidence` or `margin`.
        cfg_scale: s of classifier-free guidance, u + (s + 1)(c - u), where u has the prompt masked; 0 is off.
        eos: `allow`; `suppress` never writes the model's end-of-text token; `defer` settles stop tokens last.
        factor: f, settle the most confident positions as long as the r-th has at least 1 − f/(r + 1), and always one;
            scores as with `threshold`.
        entropy_bound: settle positions by rising entropy while those before a position have at most this much together,
            in nats, and always one; with `remasking: entropy`.
        cache: `none`; `prefix` keeps keys and values of everything before the current block, `dual` of everything but
            the block. Both are approximate: in a bidirectional network they change with every token.
        refresh_interval: calls within a block after which the cache is computed anew; None = at block starts only,
            1 = at each call, which is exact.
        revise: `none`, settled tokens never change; `remask` masks the current block's improbable ones again, fewer
            than the call settles; `edit` replaces them by tokens that have become probable.
        revise_threshold: `remask` masks tokens with a probability below this, `edit` writes those of at least this.

    Raises:
        SamplingError: values that exclude each other, or that the family does not have.
    """

    family: ClassVar[str] = "LLaDA"
    attention: ClassVar[Attention] = "bidirectional"
    revises: ClassVar[tuple[str, ...]] = ("none", "remask", "edit")

    steps: int = 128
    max_new_tokens: int = 128
    block_size: int = 32
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    eos: Eos = "allow"
    factor: float | None = None
    entropy_bound: float | None = None
    cache: Cache = "none"
    refresh_interval: int | None = None
    revise: Revise = "none"
    revise_threshold: float = 0.9

    def __post_init__(self) -> None:
        check_rule(self.remasking, self.threshold, self.factor, self.entropy_bound)
        _check_family(self)

    @property
    def rule(self) -> str:
        """Name of the selection rule that these settings ask for, a key of `rules.RULES`."""
        rules = {"threshold": self.threshold, "factor": self.factor, "entropy_bound": self.entropy_bound}
        return next((name for name, value in rules.items() if value is not None), "quota")

    @property
    def score(self) -> str:
        """Name of the score, a key of `rules.SCORES`."""
        return self.remasking

    @property
    def length(self) -> int:
        """Positions that are denoised for an answer."""
        return self.max_new_tokens

    @property
    def _keeps_old(self) -> bool:
        return self.cache != "none" and self.refresh_interval != 1

    @property
    def cuts(self) -> bool:
        """Whether the blocks after a settled stop token are left out of later calls.

        Their masks are seen by what is still open before the stop token, so it is exact only where nothing is; it is
        done where the cache is approximate anyway. A revised stop token would need them back.
        """
        return self._keeps_old and self.revise == "none"

    @property
    def approximations(self) -> tuple[str, ...]:
        """What is not computed by full forwards, in words; empty where everything is.

        The published algorithm is full forwards with the default settings. Other rules, scores, steps and ways to
        revise are other algorithms, and show as the settings that they are; they are no approximation of the network.
        """
        if not self._keeps_old:
            return ()
        often = "" if self.refresh_interval is None else f" and every {self.refresh_interval} calls"
        cut = ("blocks after a settled stop token are left out",) if self.cuts else ()
        return (f"{self.cache} cache, computed anew at block starts{often}", *cut)

    @property
    def exact(self) -> bool:
        """Whether every call is a full forward: there are no `approximations`."""
        return not self.approximations


@dataclass(frozen=True)
class CanvasSettings:
    """DiffusionGemma's entropy-bound sampler (transformers, generation_diffusion_gemma.py). Defaults are the released.

    Attributes:
        steps: N, network calls for a canvas at the most.
        max_new_tokens: length of the answer; whole canvases are denoised and the last is cut. The default of a model
            with a short context is less (`canvas_defaults`).
        block_size: the model's canvas.
        eos: `allow`; `suppress` never writes one of the model's end-of-text tokens.
        entropy_bound: positions are accepted in order of rising entropy while those before a position have at most this
            much together, in nats (arXiv 2505.24857).
        t_min, t_max: temperature t_min + (t_max − t_min)·n/N at the call with n calls left, itself counted.
        stability_threshold: a canvas stops when its most likely tokens equal those of this many calls before …
        confidence_threshold: … and the mean entropy of its positions is below this, in nats.
        cache: `block` keeps keys and values of finished canvases, which is exact, for nothing that comes later changes
            them; `none` encodes everything again after each canvas.
        revise: `redraw`, positions that are not accepted are drawn anew; the family has no other way.

    Raises:
        SamplingError: values that exclude each other, or that the family does not have.
    """

    family: ClassVar[str] = "DiffusionGemma"
    attention: ClassVar[Attention] = "block_causal"
    revises: ClassVar[tuple[str, ...]] = ("redraw",)

    steps: int = 48
    max_new_tokens: int = 256
    block_size: int = 256
    eos: Eos = "allow"
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    cache: Cache = "block"
    revise: Revise = "redraw"

    def __post_init__(self) -> None:
        if self.t_min > self.t_max:
            raise SamplingError(f"t_min: {self.t_min} is above t_max {self.t_max}; the temperature falls from t_max")
        if self.eos == "defer":
            raise SamplingError("eos: a canvas settles all of its tokens at once, so none is deferred; use suppress")
        _check_family(self)

    @property
    def rule(self) -> str:
        """Name of the selection rule, a key of `rules.RULES`."""
        return "entropy_bound"

    @property
    def length(self) -> int:
        """Positions that are denoised for an answer: whole canvases."""
        return -(-self.max_new_tokens // self.block_size) * self.block_size

    @property
    def cuts(self) -> bool:
        """False: a canvas is seen whole, and what follows it is not there yet."""
        return False

    @property
    def approximations(self) -> tuple[str, ...]:
        """What is not computed as by full forwards: nothing, since what the cache keeps never changes."""
        return ()

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def temperature(self, step: int) -> float:
        """Return the temperature of call number `step` of a canvas, from 0."""
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps


def _check_family(settings: Settings) -> None:
    """Refuse a cache or a way to revise that the family's attention or noise does not permit."""
    permitted = CACHES[settings.attention]
    if settings.cache not in permitted:
        why = (
            "keeps what finished blocks are, which changes with every token where attention goes both ways"
            if settings.attention == "bidirectional"
            else "approximates attention that goes both ways; here finished blocks never change and are kept exactly"
        )
        raise SamplingError(f"cache: {settings.cache} {why}; {settings.family} takes {', '.join(permitted)}")
    if settings.revise not in settings.revises:
        raise SamplingError(
            f"revise: {settings.family}'s sampler has no {settings.revise}; use {' or '.join(settings.revises)}"
        )


Settings = MaskSettings | CanvasSettings


def approximation_note(settings: Settings) -> str:
    """Return what is to be said beside whatever these settings gave: empty where every call is a full forward."""
    return "" if settings.exact else f"approximate sampling: {'; '.join(settings.approximations)}"
