"""Small networks whose likelihoods can be summed over all masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise

MASK = 39


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def opinionated() -> LLaDA:
    """A random LLaDA of 40 ids in 48 rows that is sure of many things, the mask's row among its favourites."""
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 64}
    ids = {"vocab_size": 40, "embedding_size": 48, "mask_token_id": MASK, "eos_token_id": 38, "pad_token_id": 37}
    model = LLaDA(LLaDAConfig(**sizes, **ids, include_bias=True))
    initialise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.transformer.ff_out.weight.mul_(4)
        model.transformer.ff_out.bias[MASK] = 2.0
    return model.eval()


@pytest.fixture(scope="session")
def exact_bound(opinionated: LLaDA) -> Callable[[Sequence[int], Sequence[int]], float]:
    """Return a function that sums the bound over all masks, one forward pass each, logits whole, in float64."""

    @torch.no_grad()
    def bound(prompt: Sequence[int], answer: Sequence[int]) -> float:
        total, length = 0.0, len(answer)
        for count in range(1, length + 1):
            for masked in itertools.combinations(range(length), count):
                ids = [*prompt, *(MASK if place in masked else token for place, token in enumerate(answer))]
                logits = opinionated.logits(opinionated(torch.tensor([ids])))[0].double()
                chosen = logits.log_softmax(dim=-1)[len(prompt) :, list(answer)].diagonal()
                total += float(chosen[list(masked)].sum()) / count / math.comb(length, count)
        return total

    return bound
