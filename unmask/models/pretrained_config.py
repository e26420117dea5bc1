"""Fields that transformers writes into any config.json, whatever the network: bookkeeping, outputs, generation.

transformers 4 can dump them all (`PretrainedConfig.to_dict`), nested configurations each their own; transformers 5
keeps generation in generation_config.json alone. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unmask.errors import ModelError, nearest

# Fields that change nothing that is computed here, whatever they say.
BOOKKEEPING = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures "
    "assistant_confidence_threshold assistant_lookbehind attn_implementation auto_map bos_token_id "
    "cross_attention_hidden_size decoder_start_token_id dtype experts_implementation finetuning_task "
    "gradient_checkpointing id2label label2id model_type name_or_path num_assistant_tokens "
    "num_assistant_tokens_schedule num_labels output_logits output_scores prefix problem_type "
    "return_dict_in_generate sep_token_id target_lookbehind task_specific_params tf_legacy_loss "
    "tie_encoder_decoder tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_version "
    "use_bfloat16 use_cache xla_device".split()
)
# Fields that ask for another network or other outputs, with the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "pruned_heads": ({}, None),
    "return_dict": (True, None),
}
# What decides the text of transformers' generate(), with its defaults; null is none. transformers 4 wrote it into
# config.json too.
_GENERATION: dict[str, Any] = {
    **dict.fromkeys(
        "bad_words_ids begin_suppress_tokens constraints dola_layers exponential_decay_length_penalty force_words_ids "
        "forced_bos_token_id forced_decoder_ids forced_eos_token_id guidance_scale max_new_tokens max_time "
        "min_new_tokens min_p penalty_alpha sequence_bias stop_strings suppress_tokens top_h "
        "watermarking_config".split()
    ),
    **dict.fromkeys("do_sample early_stopping remove_invalid_values renormalize_logits token_healing".split(), False),
    **dict.fromkeys("epsilon_cutoff eta_cutoff min_length diversity_penalty".split(), 0),
    **dict.fromkeys("encoder_no_repeat_ngram_size no_repeat_ngram_size".split(), 0),
    **dict.fromkeys("length_penalty repetition_penalty encoder_repetition_penalty".split(), 1),
    **dict.fromkeys("temperature top_p typical_p num_beams num_beam_groups num_return_sequences".split(), 1),
    **{"max_length": 20, "top_k": 50},
}
# Entries of generation_config.json that decide how fast its text comes.
_SPEED = frozenset(
    "assistant_early_exit assistant_ensemble_weight cache_config cache_implementation compile_config "
    "continuous_batching_config disable_compile generation_kwargs is_assistant low_memory max_cache_len "
    "max_matching_ngram_size prefill_chunk_size prompt_lookup_num_tokens return_legacy_cache speculation_type "
    "use_mtp".split()
)
_NESTED = "text_config"  # the nested configuration whose generation fields transformers reads as well


_WIDEST = 2**20  # of one dimension of a weight; three of them make a size that torch can still count
_LONGEST = 2**27  # rows of an embedding, positions
_DEEPEST = 10_000  # layers, which are objects in memory before any weight is


def check_size(value: int, name: str, where: str) -> None:
    """Refuse a size that no network has, before anything is made of it; `name` is its field's. Raises ModelError."""
    most = _DEEPEST if "layers" in name else _LONGEST if name.startswith(("vocab", "embedding", "max_")) else _WIDEST
    if not 1 <= value <= most:
        limit = "at least 1" if value < 1 else f"at most {most:,}"
        raise ModelError(f"{where}: {name} must be {limit}, got {value}")


def check_fields(
    values: Mapping[str, Any], own: Collection[str], only: Mapping[str, tuple[Any, ...]], family: str, where: str
) -> None:
    """Refuse fields of a config.json that are not known, all of them at once, and values that are not implemented.

    Args:
        values: field → value; a nested field is written with a dot.
        own: the family's fields, whose values it checks itself.
        only: further ones → the values that its network implements.
        family: what messages call it.
        where: what they call the file.

    Raises:
        ModelError: naming every such field.
    """
    allowed = {name: only.get(name, _PLAIN.get(_last(name))) for name in values}
    spelt = [*own, *only, *BOOKKEEPING, *_PLAIN]
    unknown = [
        f"{name!r}{nearest(name, spelt)}"
        for name, choices in allowed.items()
        if choices is None and name not in own and _last(name) not in BOOKKEEPING and _last(name) not in _GENERATION
    ]
    if unknown:
        raise ModelError(
            f"{where}: unknown {family} field{'s' * (len(unknown) > 1)} {', '.join(unknown)}; what is not known here "
            "may ask for another network: correct it, or remove what asks for nothing"
        )
    refused = [
        f"{name}={values[name]!r} is not supported, this network implements {name}={choices[0]!r} only"
        for name, choices in allowed.items()
        if choices is not None and values[name] not in choices
    ]
    if refused:
        raise ModelError(f"{where}: {'; '.join(refused)}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def generation_note(values: Mapping[str, Any], generation: Mapping[str, Any], read: Collection[str]) -> str:
    """Return a warning of generation settings that a checkpoint brings and sampling does not read; else empty.

    Args:
        values: of its config.json, of which sampling reads none.
        generation: of its generation_config.json.
        read: those of the latter that sampling reads.
    """
    nested = values.get(_NESTED)
    config = {**(nested if isinstance(nested, Mapping) else {}), **values}
    sources = {
        "config.json": {name: value for name, value in config.items() if name in _GENERATION},
        "generation_config.json": {name: value for name, value in generation.items() if _decides(name, read)},
    }
    found = [
        f"{name}={repr(value)[:40]} of {file}"
        for file, given in sources.items()
        for name, value in sorted(given.items())
        if value not in (None, _GENERATION.get(name, False), "", [], {})
    ]
    if not found:
        return ""
    return (
        f"not used: {', '.join(found)}; sampling starts from the family's own defaults, so give the sampler's settings "
        "instead, such as --temperature"
    )


def _decides(name: str, read: Collection[str]) -> bool:
    """Say whether an entry of generation_config.json, which is not read, may be meant to decide an answer."""
    harmless = name.startswith("_") or "token_id" in name or name in BOOKKEEPING or name in _SPEED
    return not harmless and name not in read
