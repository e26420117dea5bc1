"""`Family`: the record that describes a model family to the rest of the package, one in each `family.py`. No torch.

Code outside a family's folder asks a record for `noise`, `attention` or a capability, never for the family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# What corruption replaces a token by: the mask token, or one drawn uniformly from the vocabulary.
Noise = Literal["mask", "uniform"]
# What a position sees: all others; its own block and those before it; or, in a canvas of noise that the decoder reads,
# that canvas and the clean tokens before it, which a causal encoder has read.
Attention = Literal["bidirectional", "block_causal", "canvas"]


def _never(key: str) -> bool:
    return False


def _untied(key: str) -> None:
    return None


@dataclass(frozen=True)
class FileLayout:
    """What released files hold beside the network's own tensors, whose keys are the files'.

    Attributes:
        passthrough: whether a stored tensor is not the network's, and is copied unchanged into what is saved.
        tied_to: the key whose weights a stored tensor repeats (tied weights stored twice); None otherwise.
        passthrough_part: what a message calls what is passed through, such as "vision tower".
    """

    passthrough: Callable[[str], bool] = _never
    tied_to: Callable[[str], str | None] = _untied
    passthrough_part: str = ""

    def holds(self, key: str, network: Container[str | None]) -> bool:
        """Say whether a tensor of that key may be in a file of a network with these keys."""
        return key in network or self.passthrough(key) or self.tied_to(key) in network


PLAIN_LAYOUT = FileLayout()  # the network's tensors and nothing else


@dataclass(frozen=True)
class LoraTargets:
    """The part of a network that LoRA may adapt. Patterns are globs over full module names.

    Attributes:
        linears: linear layers that a low-rank update may be added to.
        default: those of them that are adapted when a run names none.
        whole: modules that may be trained whole beside the adapter (`modules_to_save`).
        frozen: part of a module's name → why nothing of that name can be adapted.
        aliases: (our prefix, theirs): further names of the same weight in the reference class.
    """

    linears: tuple[str, ...]
    default: tuple[str, ...]
    whole: tuple[str, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()

    def reference_names(self, name: str) -> list[str]:
        """Return every name that the reference class has for a module or parameter of ours, ours first."""
        others = [theirs + name.removeprefix(ours) for ours, theirs in self.aliases if name.startswith(ours)]
        return [name, *others]

    def own_name(self, name: str) -> str:
        """Return our name of a module or parameter of the reference class."""
        for ours, theirs in self.aliases:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def why_frozen(self, text: str) -> str | None:
        """Return why the module (or pattern) of that name cannot be adapted; None when no reason is listed."""
        return next((reason for word, reason in self.frozen.items() if word in text), None)


@dataclass(frozen=True)
class ShardPlan:
    """How a network is divided over ranks.

    Attributes:
        blocks: path of the list of blocks, each of which is gathered and freed as one.
        methods: methods of the network, other than forward, that run blocks; FSDP2 hooks module calls alone.
        experts: name of a block's mixture of experts; None without one.
        over_tokens: method that runs every block once, given token ids (B, L) alone; None = forward.
        forward_passes, backward_passes: of the blocks in one micro-batch, to estimate communication.
    """

    blocks: str
    methods: tuple[str, ...] = ()
    experts: str | None = None
    over_tokens: str | None = None
    forward_passes: int = 1
    backward_passes: int = 1


@dataclass(frozen=True)
class SamplerDefaults:
    """How a family samples when a caller says nothing; names are those of `SamplerConfig`.

    Attributes:
        values: setting → the released value.
        presets: preset → settings over `values`: `reference` (the published algorithm), `balanced`, `fast`.
        from_config: setting → attribute of the parsed config.json that fixes it; no other value is taken.
        from_generation: entry of a checkpoint's generation_config.json → setting, over `values`. An entry within an
            entry is written with a dot.
        window_cache: whether the network's `forward` takes a `cache` of keys and values, as `prefix` and `dual` need.
    """

    values: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]]
    from_config: Mapping[str, str] = field(default_factory=dict)
    from_generation: Mapping[str, str] = field(default_factory=dict)
    window_cache: bool = False


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a family's released tokenizer, for a tokenizer trained from scratch.

    Attributes:
        tokens: in the order of their ids, from 0.
        roles: which of them is what, in transformers' names (`bos_token`, `eos_token`, `pad_token`, `mask_token`).
    """

    tokens: tuple[str, ...]
    roles: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One model family. What is named "module:attribute" is imported when it is used.

    Attributes:
        name: as people write it.
        model_type: the value of config.json's `model_type`.
        architectures: class names that a config.json may carry; the first is written.
        noise: what corruption does to its tokens.
        attention: what its positions see of each other.
        parse_config: (values of a config.json, where they stand) → its frozen configuration; raises ModelError.
        network: "module:Class", called with a configuration; weights uninitialised, on torch's default device.
        initialise: "module:function" (network, generator) that draws fresh weights in place.
        activation_bytes: bytes that a forward pass keeps for backward, of (config, tokens, bytes of a residual element,
            bytes of a matmul input, whether activation checkpointing is on).
        attention_layers: configuration → for each layer the width of its queries, all heads together, and its window
            (None = all positions).
        lora: what LoRA may adapt.
        shard: how the network is divided over ranks.
        sampler: how it samples by default.
        files: what its files hold beside the network.
        chat_template: name of the packaged chat template that marks the assistant's tokens; None = none.
        control_tokens: of its released tokenizer; None = no tokenizer can be trained from scratch for it.
        auto_config: "module:function" that registers transformers' AutoConfig; None where transformers has the family.
        auto: the same for all Auto classes.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    noise: Noise
    attention: Attention
    parse_config: Callable[[Mapping[str, Any], str], Any]
    network: str
    initialise: str
    activation_bytes: Callable[[Any, int, int, int, bool], int]
    attention_layers: Callable[[Any], Sequence[tuple[int, int | None]]]
    lora: LoraTargets
    shard: ShardPlan
    sampler: SamplerDefaults
    files: FileLayout = PLAIN_LAYOUT
    chat_template: str | None = None
    control_tokens: ControlTokens | None = None
    auto_config: str | None = None
    auto: str | None = None
