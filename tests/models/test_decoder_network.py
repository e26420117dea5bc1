"""The decoder trunk against golden logits, transformers' own classes and the laws that every network keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import unmask
from unmask.errors import ModelError, SamplingError
from unmask.models.decoder.model import Decoder, initialise, place_before
from unmask.models.kv_cache import KeyValueStore
from unmask.models.registry import FAMILIES, resolve
from unmask.models.weights import save_weights
from unmask.sampling.backends.window import Window, forward_window, spans

Model = Any  # a network in memory, whose attributes are tensors and modules
Made = tuple[dict, Decoder]

REFERENCES: dict[str, tuple[Any, Any]] = {
    "Dream": (Qwen2Config, Qwen2ForCausalLM),
    "a2d-llama": (LlamaConfig, LlamaForCausalLM),
    "a2d-qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "a2d-qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
IDS = {"mask_token_id": 39, "eos_token_id": 38, "pad_token_id": 38}
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
}  # fmt: skip
ROPE: dict[str, dict] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with everything": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 2.0,
        "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False,
    },
    "yarn with a factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3,
    },
}  # fmt: skip


def values_of(model_type: str, **fields: object) -> dict:
    """A small config.json."""
    says = {"attention": "bidirectional"} if model_type != "Dream" else {}
    return {"model_type": model_type, **SIZES, **IDS, "head_dim": 6, **says, **fields}


def made(values: dict, seed: int = 1) -> Decoder:
    """A random network of a config.json; biases and norms are random too, so that none can hide."""
    model = Decoder(resolve(FAMILIES[values["model_type"]]).parse_config(values, "config.json"))
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 10
    return model


def written(values: dict, model: Decoder, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_weights(model.state_dict().items(), folder)
    return folder


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 38, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def golden(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that copies a checkpoint and has its config.json say what released ones do not."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(fixtures / "families" / name, folder)
        values = json.loads((folder / "config.json").read_text())
        if name.startswith("a2d"):
            values |= {"attention": "bidirectional", "mask_token_id": 317}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


@pytest.mark.parametrize("name", ["dream_tiny", "a2d_qwen3_tiny"])
@pytest.mark.parametrize("case", ["forward", "left_padded", "right_padded"])
def test_golden_logits(name: str, case: str, golden) -> None:
    """The released network's logits; `forward` of a shifted family has them one place later."""
    folder = golden(name)
    model: Model = unmask.load_model(str(folder))
    expected = load_file(folder / "expected.safetensors")
    tokens, mask = expected["forward.input_ids"], expected.get(f"{case}.attention_mask")
    positions, logits = expected.get(f"{case}.position_ids"), expected[f"{case}.logits"]
    attended = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        released = model.logits(model.model(tokens, mask, positions))
        ours = model.logits(model(tokens, mask))
    torch.testing.assert_close(released[attended], logits[attended], atol=5e-4, rtol=0)
    if not model.config.shift:
        torch.testing.assert_close(ours[attended], logits[attended], atol=5e-4, rtol=0)
        return
    for row, keep in enumerate(attended):
        real, found = logits[row, keep], ours[row, keep]
        torch.testing.assert_close(found, torch.cat((real[:1], real[:-1])), atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("Dream", {}),
        ("Dream", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("a2d-qwen2", {"num_key_value_heads": 4}),
        ("a2d-qwen3", {"head_dim": 10}),
        ("a2d-qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("a2d-llama", {"head_dim": None}),
        ("a2d-llama", {"attention_bias": True, "head_dim": 10}),
        *(("a2d-llama", {"rope_scaling": scaling}) for scaling in ROPE.values()),
        *(("a2d-qwen3", {"rope_scaling": scaling}) for scaling in ROPE.values()),
        ("Dream", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("a2d-qwen3", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seen", ["everything", "earlier", "own document"])
def test_logits_and_gradients_are_those_of_transformers(model_type: str, fields: dict, seen: str) -> None:
    """Under the same mask, with the autoregressive class of the layout."""
    values = values_of(model_type, **fields)
    ours = made(values)
    config_class, model_class = REFERENCES[model_type]
    ignored = ("model_type", "attention", "mask_token_id", "pad_token_id")
    given = {key: value for key, value in values.items() if key not in ignored and value is not None}
    given["rope_scaling"] = dict(values.get("rope_scaling") or {}) or None
    if "rope_parameters" in given:
        del given["rope_scaling"]
    theirs: Model = model_class._from_config(config_class(**given), attn_implementation="sdpa").eval()
    theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
    theirs.tie_weights()
    tokens, length = ids(2, 11), 11
    place = torch.arange(length)
    allowed = {
        "everything": torch.ones(length, length, dtype=torch.bool),
        "earlier": place[:, None] >= place,
        "own document": (place[:, None] < 4) == (place < 4),
    }[seen]
    mask = allowed.expand(2, 1, length, length)
    weights = torch.randn(2, length, 40, generator=torch.Generator().manual_seed(3))
    found = ours.logits(ours.model(tokens, mask))
    expected = theirs(tokens, attention_mask=mask).logits
    assert float(expected.detach().std()) > 0.5
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert gradients[name] is not None and float(gradients[name].abs().max()) > 0, name
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-4, rtol=2e-4, msg=name)


def test_a_shifted_network_reads_a_token_from_the_place_before() -> None:
    model, tokens = made(values_of("Dream")), ids(3, 9)
    with torch.no_grad():
        released, ours = model.model(tokens), model(tokens)
        assert torch.equal(ours[:, 1:], released[:, :-1]) and torch.equal(ours[:, 0], released[:, 0])


def test_the_place_before_is_an_attended_one() -> None:
    holes = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert place_before(holes, 4, 5, torch.device("cpu")).tolist() == [
        [0, 1, 2, 2, 3], [0, 0, 1, 1, 1], [0, 0, 1, 2, 2], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    document = torch.tensor([0, 0, 0, 1, 1])
    packed = (document[:, None] == document)[None, None]
    assert place_before(packed, 1, 5, torch.device("cpu")).tolist() == [[0, 0, 1, 3, 3]]
    padded = torch.tensor([0, 0, 1, 1, 1], dtype=torch.bool).expand(1, 1, 1, 5)
    assert place_before(padded, 1, 5, torch.device("cpu"))[0, 2:].tolist() == [2, 2, 3]


@pytest.mark.parametrize("model_type", REFERENCES)
def test_padding_and_packing_change_nothing(model_type: str) -> None:
    model, one, two = made(values_of(model_type)), ids(1, 7, seed=1), ids(1, 5, seed=2)
    with torch.no_grad():
        alone, other = model(one)[0], model(two)[0]
        left = model(torch.cat((ids(1, 4), one), 1), torch.tensor([[0] * 4 + [1] * 7]))[0, 4:]
        right = model(torch.cat((one, ids(1, 4)), 1), torch.tensor([[1] * 7 + [0] * 4]))[0, :7]
        document = torch.tensor([0] * 7 + [1] * 5)
        positions = torch.tensor([[*range(7), *range(5)]])
        packed = model(torch.cat((one, two), 1), (document[:, None] == document)[None, None], positions)[0]
    for found, expected in ((left, alone), (right, alone), (packed[:7], alone), (packed[7:], other)):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_window_computes_what_the_whole_row_does() -> None:
    """With a store of the very tokens; a shifted network refuses one."""
    model, tokens = made(values_of("a2d-qwen3")), ids(2, 9)
    config = model.config
    store = KeyValueStore.empty(
        [(config.kv_heads, config.head_dim)] * config.n_layers, 2, 9, model.model.embed_tokens.weight
    )
    whole = Window.of(store, spans(torch.tensor([0, 0]), torch.tensor([9, 9])), [9, 9])
    part = Window.of(store, spans(torch.tensor([4, 4]), torch.tensor([7, 7])), [9, 9])
    with torch.no_grad():
        expected = forward_window(model, tokens, whole)
        torch.testing.assert_close(forward_window(model, tokens[:, 4:7], part), expected[:, 4:7], atol=2e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="takes no cache; run full forwards"):
        forward_window(made(values_of("Dream")), tokens[:, 4:7], part)
    with pytest.raises(SamplingError, match="cache: Dream's network takes no keys and values of calls before"):
        unmask.generate(made(values_of("Dream")), [1, 2], sampler=unmask.SamplerConfig(cache="dual"))


def test_checkpointing_changes_no_gradient_and_long_inputs_are_refused() -> None:
    model, tokens = made(values_of("a2d-qwen3")), ids(2, 9)
    found = []
    for on in (False, True):
        model.model.activation_checkpointing = on
        model.zero_grad()
        model(tokens).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(ModelError, match="65 tokens is longer than the model's max_position_embeddings 64"):
        model(ids(1, 65))


@given(
    model_type=st.sampled_from(sorted(REFERENCES)),
    tied=st.booleans(),
    bias=st.booleans(),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 3)]),
    head_dim=st.sampled_from([2, 6, 16]),
    scaling=st.sampled_from(sorted(ROPE)),
    layers=st.integers(1, 2),
)
def test_any_switches_build_save_load_and_sample(
    model_type: str, tied: bool, bias: bool, heads: tuple[int, int], head_dim: int, scaling: str, layers: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    fields: dict = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
    fields |= {"tie_word_embeddings": tied, "num_hidden_layers": layers, "rope_scaling": ROPE[scaling] or None}
    if "qwen3" in model_type or "llama" in model_type:
        fields["attention_bias"] = bias
    values = values_of(model_type, **fields)
    model = made(values)
    folder = tmp_path_factory.mktemp("any") / "one"
    loaded: Model = unmask.load_model(str(written(values, model, folder)))
    assert ("lm_head.weight" in loaded.state_dict()) != tied
    for (key, one), (other_key, other) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other)
    prompts = [[1, 2, 3], [4]]
    answers = unmask.generate(loaded, prompts, sampler=unmask.SamplerConfig(max_new_tokens=5, steps=3))
    assert [len(answer.token_ids) for answer in answers if answer.finish_reason == "length"] == [5] * sum(
        answer.finish_reason == "length" for answer in answers
    )
    assert all(IDS["mask_token_id"] not in answer.token_ids for answer in answers)


@pytest.mark.parametrize("model_type", REFERENCES)
def test_transformers_loads_and_saves_it(model_type: str, tmp_path: Path) -> None:
    """Its logits are the released ones, which a shifted family's sampler shifts."""
    unmask.register()
    unmask.register()  # repeatable
    values = values_of(model_type, rope_scaling=ROPE["yarn"], tie_word_embeddings=model_type == "a2d-qwen3")
    model, tokens = made(values), ids(2, 6)
    folder, mask = written(values, model, tmp_path / "ours"), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        theirs: Model = auto.from_pretrained(folder)
        assert type(theirs).__name__ == resolve(FAMILIES[model_type]).architectures[0]
        with torch.no_grad():
            assert torch.equal(theirs(tokens, mask).logits, model.logits(model.model(tokens, mask)))
    theirs.save_pretrained(tmp_path / "theirs")  # pyright: ignore[reportPossiblyUnboundVariable]
    back: Model = unmask.load_model(str(tmp_path / "theirs"))
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    for name, remedy in (("labels", "unmask train"), ("past_key_values", "unmask generate"), ("other", "leave it out")):
        with pytest.raises(ModelError, match=f"does not take {name}.*{remedy}"):
            theirs(tokens, **{name: tokens})  # pyright: ignore[reportPossiblyUnboundVariable]
    fresh: Model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    assert (fresh.model.norm.weight == 1).all() and float(fresh.model.embed_tokens.weight.detach().std()) < 0.03


@pytest.mark.parametrize("model_type", REFERENCES)
def test_bfloat16_and_autocast_stay_near(model_type: str) -> None:
    model, tokens = made(values_of(model_type)), ids(2, 9)
    with torch.no_grad():
        expected = model.logits(model(tokens))
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.logits(model(tokens))
        narrow = model.to(torch.bfloat16)
        assert narrow(tokens).dtype == torch.bfloat16
        for found in (cast, narrow.logits(narrow(tokens))):
            assert float((found - expected).abs().mean()) < 0.05 * float(expected.std())
