"""Token-exact with transformers' DiffusionGemma sampler, given the same random draws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.loop import Request, StepEvent, denoise
from unmask.sampling.settings import family_settings

CanvasSettings = partial(family_settings, DIFFUSION_GEMMA, block_size=256)

# transformers' generate marks its steps for CUDA graphs, and torch's modules behind that use what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

EOS = (1, 7)
# At low temperatures the network below is sure, so canvases stop before their last step.
SURE = {"steps": 24, "entropy_bound": 30.0, "confidence_threshold": 0.5, "t_min": 0.05, "t_max": 0.2}
PATIENT = {
    **SURE,
    "entropy_bound": 2.0,
    "confidence_threshold": 0.2,
    "t_min": 0.02,
    "t_max": 0.1,
    "stability_threshold": 2,
}
AT_ONCE = {"steps": 24, "confidence_threshold": 2.0, "stability_threshold": 0}


class OneGenerator:
    """Draws in transformers' order, one row alone: a canvas of `randint`, then `multinomial` and `randint` a step."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def category(self, positions, weights_MV):
        probabilities_MV = weights_MV / weights_MV.sum(dim=-1, keepdim=True)
        return torch.multinomial(probabilities_MV, num_samples=1, generator=self.generator)[:, 0]

    def noise(self, positions, vocab_size):
        return torch.randint(0, vocab_size, (1, len(positions.column_M)), generator=self.generator)[0]


def published(reference, prompt: list[int], seed: int, settings: CanvasSettings) -> tuple[list[int], int]:
    """The published sampler's new tokens and network calls."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=settings.max_new_tokens,
            max_denoising_steps=settings.steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=settings.entropy_bound),
            t_min=settings.t_min,
            t_max=settings.t_max,
            stability_threshold=settings.stability_threshold,
            confidence_threshold=settings.confidence_threshold,
            eos_token_id=list(EOS),
        )
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, round(len(tokens) / float(out.tokens_per_forward))


def ours(model, prompt: list[int], seed: int, settings: CanvasSettings) -> list[StepEvent]:
    return list(denoise(backend_for(model), [Request(0, prompt, 0)], settings, draws=OneGenerator(seed)))


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(8, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("fields", "length", "seed", "calls", "reason"),
    [
        ({"steps": 5}, 3, 0, [5, 5, 5], "length"),
        ({"steps": 5}, 30, 1, [5, 5], "eos"),
        (SURE, 3, 0, [11, 6], "eos"),
        (SURE, 30, 0, [18, 11, 24], "length"),
        (PATIENT, 3, 1, [24, 20, 24], "length"),
        (AT_ONCE, 30, 2, [1, 1, 1], "length"),
    ],
    ids=["few steps", "EOS", "early stop and EOS", "beyond the window", "two stable steps", "no stability asked"],
)
def test_tokens_and_calls_equal_transformers(gemma_model, gemma_reference, fields, length, seed, calls, reason):
    settings = CanvasSettings(max_new_tokens=40, block_size=16, **fields)
    prompt = prompt_of(length, seed)
    expected, expected_calls = published(gemma_reference, prompt, seed, settings)
    events = ours(gemma_model, prompt, seed, settings)
    answer = events[-1].answer_BC[0].tolist()
    committed = (~events[-1].masked_BC[0]).sum()
    assert answer[:committed] == expected[: min(40, len(expected))]
    assert len(events) == expected_calls
    stops = [int(event.step_B[0]) + 1 for event in events if event.committed_BC.any()]
    assert stops == calls
    assert bool(set(EOS) & set(answer[:committed])) == (reason == "eos")
