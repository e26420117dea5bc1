"""Networks whose answers are known: the reference checkpoint, small random ones, transformers' DiffusionGemma beside
ours, and one that follows a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.family import parse_config
from unmask.models.llada.model import LLaDA, initialise
from unmask.models.loading import load_model
from unmask.sampling.backends.backend import ModelSpec
from unmask.sampling.backends.bidirectional import Prompts
from unmask.sampling.engine.state import Positions

REFERENCE = Path(__file__).parents[1] / "fixtures" / "llada_tiny"
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference_model() -> LLaDA:
    model = LLaDA(parse_config(json.loads((REFERENCE / "config.json").read_text()), "config.json"))
    model.load_state_dict(load_file(REFERENCE / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    return load_file(REFERENCE / "expected.safetensors") | load_file(REFERENCE / "expected_cached.safetensors")


@pytest.fixture(scope="session")
def small_model() -> Callable[..., LLaDA]:
    """Return a function that makes a random network: 40 ids in 48 rows, mask 39, EOS 38, pad 37."""

    def make(favour: dict[int, float] | None = None, **fields) -> LLaDA:
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 48, "max_sequence_length": 128}
        ids = {"vocab_size": 40, "embedding_size": 48, "mask_token_id": 39, "eos_token_id": 38, "pad_token_id": 37}
        model = LLaDA(LLaDAConfig(**(sizes | ids | {"include_bias": True} | fields)))
        initialise(model, torch.Generator().manual_seed(1))
        with torch.no_grad():
            model.transformer.ff_out.weight.mul_(3)
            for token, bias in (favour or {}).items():
                model.transformer.ff_out.bias[token] = bias
        return model

    return make


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory) -> Path:
    """A random DiffusionGemma as transformers saves it: 300 ids, canvases of 16, window 12, EOS 1 and 7.

    Its weights are scaled so that it is sure of itself at low temperatures, as a trained one is.
    """
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_global_key_value_heads": 1, "global_head_dim": 16,
        "sliding_window": 12, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
        "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=16, eos_token_id=[1, 7])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.mul_(40)
        for name, parameter in model.named_parameters():
            if "layers" in name and "proj" in name and "vision" not in name:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma_reference(gemma_folder):
    """The network as transformers runs it."""
    from transformers import DiffusionGemmaForBlockDiffusion

    return DiffusionGemmaForBlockDiffusion.from_pretrained(gemma_folder).eval()


@pytest.fixture
def gemma_model(gemma_folder):
    """The same network as ours."""
    return load_model(str(gemma_folder))


class Script:
    """A backend whose logits are a function of (prompt's first token, position, calls so far).

    10 ids, mask 9, EOS 8.
    """

    self_conditioning = None

    def __init__(self, script: Callable[[int, int, int], Tensor], vocab_size: int = 10) -> None:
        self.spec = ModelSpec(9, (9,), (8,), vocab_size, vocab_size, 1000)
        self.device = torch.device("cpu")
        self.script = script
        self.calls = 0

    def prefill(self, prompts) -> Prompts:
        return Prompts.of(prompts)

    def denoise(self, context, call) -> tuple[Tensor, Positions, Prompts]:
        requests_M = context.ids_BP[call.rows_M, 0]
        pairs = zip(requests_M.tolist(), call.positions.column_M.tolist(), strict=True)
        found = torch.stack([self.script(request, position, self.calls) for request, position in pairs])
        self.calls += 1
        return found, call.positions, context

    def logits(self, hidden_MD) -> Tensor:
        return hidden_MD.clone()

    def commit(self, context, answer_BC, first_B, end_B, completed_B):
        return context


@pytest.fixture(scope="session")
def script() -> type[Script]:
    return Script


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 260 ids with a chat template; <|mask|> is 257, <|eot_id|> 258, <|endoftext|> 259."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    controls = ("<|start|>", "<|mask|>", "<|eot_id|>", "<|endoftext|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in controls])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def text_model(small_model) -> LLaDA:
    """A random network for `chat_tokenizer`."""
    ids = {"mask_token_id": 257, "eos_token_id": 259, "pad_token_id": 259}
    return small_model(vocab_size=260, embedding_size=260, **ids)
