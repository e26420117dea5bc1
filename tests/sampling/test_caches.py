"""The approximate caches: as published where they approximate, exact where they must be, rows apart from each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from unmask.config.sampler import SamplerConfig
from unmask.models.llada.family import FAMILY as LLADA
from unmask.sampling.backends.backend import Call
from unmask.sampling.backends.bidirectional import BidirectionalBackend
from unmask.sampling.engine.state import Positions
from unmask.sampling.generate import generate
from unmask.sampling.settings import family_settings

MaskSettings = partial(family_settings, LLADA)

CACHES = ("prefix", "dual")
PROMPTS = [[3, 9, 4], [11, 2, 30, 8, 5, 17, 21], [6], [1, 2, 3, 4, 5], [3, 3], [20, 19, 18, 17, 16, 15]]
PLAIN = [({"refresh_interval": 3}, {"weight_tying": True, "include_bias": False}), ({"eos": "allow"}, {})]
VARIANTS = [{}, {"n_kv_heads": 1}, {"weight_tying": True, "include_bias": False}]


def tokens_and_calls(model, prompts, **settings) -> list[tuple[list[int], int]]:
    settings = {"steps": 12, "max_new_tokens": 20, "block_size": 8, "eos": "suppress"} | settings
    batch_size = settings.pop("batch_size", len(prompts))
    found = generate(model, prompts, sampler=SamplerConfig(**settings), batch_size=batch_size)
    return [(answer.token_ids, answer.stats.nfe) for answer in found]


@pytest.fixture(scope="module")
def models(small_model):
    """Two layers, so that keys depend on other tokens and a cache approximates."""

    def make(**fields):
        fields = {"n_layers": 2, "n_heads": 4} | fields
        tied = fields.get("weight_tying", False)
        model = small_model(**fields) if not tied else None
        if model is None:
            from unmask.models.llada.config import LLaDAConfig
            from unmask.models.llada.model import LLaDA, initialise

            like = small_model(n_layers=2, n_heads=4).config
            model = LLaDA(LLaDAConfig(**{**vars(like), **fields}))
            initialise(model, torch.Generator().manual_seed(1))
            with torch.no_grad():
                model.transformer.wte.weight.mul_(3)
        return model

    return make


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("rule", "threshold"), [("quota", None), ("threshold_0.3", 0.3)])
@pytest.mark.parametrize("others", [0, 2])
def test_tokens_and_network_calls_equal_the_published_caches(
    reference_model, reference, cache, rule, threshold, others
):
    prompts = reference["generate.prompt"].tolist()
    # Beside rows of other lengths and paces, the first row's tokens and calls are still its own.
    batch = [prompts[0], prompts[1][:3], prompts[0][2:]][: 1 + others]
    sampler = SamplerConfig(steps=16, max_new_tokens=32, block_size=8, threshold=threshold, cache=cache)
    found = generate(reference_model, batch, sampler=sampler)[0]
    assert found.token_ids == reference[f"{cache}.{rule}.output"][0, len(prompts[0]) :].tolist()
    assert found.stats.nfe == int(reference[f"{cache}.{rule}.nfe"])


def test_the_published_caches_differ_from_no_cache(reference):
    outputs = [tuple(reference[f"{cache}.quota.output"][0].tolist()) for cache in ("none", *CACHES)]
    assert len(set(outputs)) == 3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("settings", "fields"),
    [({}, VARIANTS[1]), ({"threshold": 0.2}, {}), ({"cfg_scale": 1.5, "threshold": 0.2}, {}), *PLAIN],
    ids=str,
)
def test_a_row_alone_equals_the_row_in_any_batch(models, cache, settings, fields):
    model = models(**fields)
    alone = [tokens_and_calls(model, [prompt], cache=cache, **settings)[0] for prompt in PROMPTS]
    assert tokens_and_calls(model, PROMPTS, cache=cache, **settings) == alone
    assert tokens_and_calls(model, PROMPTS[::-1], cache=cache, batch_size=4, **settings) == alone[::-1]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}, {"cfg_scale": 1.5}, {"temperature": 0.7}], ids=str)
def test_a_refresh_at_each_call_is_exact(models, cache, settings):
    model = models()
    exact = tokens_and_calls(model, PROMPTS, **settings)
    assert tokens_and_calls(model, PROMPTS, cache=cache, refresh_interval=1, **settings) == exact


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("settings", [{"steps": 3}, {"threshold": 0.0}], ids=str)
def test_blocks_of_one_call_are_exact(models, cache, settings):
    model = models()
    assert tokens_and_calls(model, PROMPTS, cache=cache, **settings) == tokens_and_calls(model, PROMPTS, **settings)


@pytest.mark.parametrize("cache", CACHES)
def test_one_layer_is_exact(models, cache):
    """Its keys and values depend on their own token alone, and within a block no other position's changes."""
    model = models(n_layers=1)
    assert tokens_and_calls(model, PROMPTS, cache=cache) == tokens_and_calls(model, PROMPTS)


def test_one_block_is_the_same_to_both_caches(models):
    """Nothing follows the block, so `the block` and `the block and what follows` are one window."""
    settings = {"block_size": 20, "steps": 20}
    model = models()
    prefix, dual = (tokens_and_calls(model, PROMPTS, cache=cache, **settings) for cache in CACHES)
    assert prefix == dual


def call(answer_BC, lengths, first, step, end=None) -> Call:
    """A call that scores each row's block of four, or what there is of it."""
    end = [min(f + 4, n) for f, n in zip(first, lengths, strict=True)] if end is None else end
    places = [(row, p) for row, (f, e) in enumerate(zip(first, end, strict=True)) for p in range(f, e)]
    rows_M, columns_M = torch.tensor(places).T
    zero_M = torch.zeros_like(columns_M)
    positions = Positions(zero_M, zero_M, columns_M, zero_M, zero_M)
    first_B, end_B = torch.tensor(first), torch.tensor(end)
    return Call(answer_BC, tuple(lengths), first_B, end_B, torch.tensor(step), rows_M, positions)


def backend(model, **settings) -> BidirectionalBackend:
    return BidirectionalBackend(model, MaskSettings(**settings))


def answers(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 36, (rows, 12), generator=torch.Generator().manual_seed(seed))


def full_forward(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt + answer]))[0, len(prompt) :]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_calls_of_an_unchanged_answer_are_full_forwards(models, cache, fields):
    """Nothing in the store is out of date, so a window over it is no approximation; rows stand in different blocks."""
    model, prompts = models(**fields), PROMPTS[:3]
    ours, answer_BC, lengths = backend(model, cache=cache), answers(3, 0), [12, 9, 11]
    context = ours.prefill(prompts)
    for step in ([0, 0, 0], [1, 1, 1], [0, 2, 0], [1, 3, 1]):
        asked = call(answer_BC, lengths, [4, 0, 8], step)
        hidden_MD, _, context = ours.denoise(context, asked)
        whole = [full_forward(model, p, a[:n]) for p, a, n in zip(prompts, answer_BC.tolist(), lengths, strict=True)]
        expected = [whole[row][position] for row, position in zip(asked.rows_M, asked.positions.column_M, strict=True)]
        torch.testing.assert_close(hidden_MD, torch.stack(expected))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
def test_rows_that_join_and_leave_change_nothing_for_the_others(models, cache, cfg_scale):
    model = models()
    ours = backend(model, cache=cache, cfg_scale=cfg_scale)
    changed = [answers(4, seed) for seed in range(4)]

    def alone(row: int, steps: list[tuple[int, int]]) -> torch.Tensor:
        context, found = ours.prefill([PROMPTS[row]]), None
        for time, step in steps:
            found, _, context = ours.denoise(context, call(changed[time][row : row + 1], [12], [4], [step]))
        assert found is not None
        return found

    first = ours.prefill(PROMPTS[:2])
    _, _, first = ours.denoise(first, call(changed[0][:2], [12, 12], [4, 4], [0, 0]))
    _, _, first = ours.denoise(first, call(changed[1][:2], [12, 12], [4, 4], [1, 1]))
    # Row 0 leaves; rows 2 and 3 join, one of them with a store of its own already.
    other = ours.prefill([PROMPTS[2]])
    _, _, other = ours.denoise(other, call(changed[1][2:3], [12], [4], [0]))
    context = first.select(torch.tensor([False, True])).concat(other.concat(ours.prefill([PROMPTS[3]])))
    hidden, _, _ = ours.denoise(context, call(changed[2][1:], [12] * 3, [4] * 3, [2, 1, 0]))
    expected = [alone(1, [(0, 0), (1, 1), (2, 2)]), alone(2, [(1, 0), (2, 1)]), alone(3, [(2, 0)])]
    torch.testing.assert_close(hidden, torch.cat(expected))


def test_a_batch_that_all_rows_leave_can_be_joined(models):
    ours, answer_BC = backend(models(), cache="dual"), answers(1, 0)
    _, _, context = ours.denoise(ours.prefill(PROMPTS[:1]), call(answer_BC, [12], [0], [0]))
    context = context.select(torch.tensor([False])).concat(ours.prefill(PROMPTS[1:2]))
    hidden_MD, _, _ = ours.denoise(context, call(answer_BC, [12], [0], [0]))
    torch.testing.assert_close(hidden_MD, full_forward(ours.model, PROMPTS[1], answer_BC[0].tolist())[:4])


@pytest.mark.parametrize(
    ("cache", "widths"), [("none", [15, 15, 15, 15]), ("prefix", [15, 8, 15, 8]), ("dual", [15, 4, 15, 4])]
)
def test_the_network_computes_no_more_than_the_window(models, monkeypatch, cache, widths):
    model, seen = models(), []
    ours = backend(model, cache=cache, refresh_interval=None if cache == "none" else 2)
    project = model.transformer.blocks[0].q_proj.forward

    def counted(hidden):
        seen.append(hidden.shape[1])
        return project(hidden)

    monkeypatch.setattr(model.transformer.blocks[0].q_proj, "forward", counted)
    context = ours.prefill(PROMPTS[:1])
    for step in range(4):
        _, _, context = ours.denoise(context, call(answers(1, step), [12], [4], [step]))
    assert seen == widths


def test_given_positions_before_the_block_are_seen(models):
    """Another token in a committed block changes what a window computes, once a full forward has seen it."""
    ours, answer_BC = backend(models(), cache="dual"), answers(1, 0)
    _, _, context = ours.denoise(ours.prefill(PROMPTS[:1]), call(answer_BC, [12], [4], [0]))
    stale, _, context = ours.denoise(context, call(answer_BC, [12], [4], [1]))
    changed_BC = answer_BC.clone()
    changed_BC[:, 0] = (answer_BC[:, 0] + 1) % 36
    unseen, _, context = ours.denoise(context, call(changed_BC, [12], [4], [1]))
    torch.testing.assert_close(unseen, stale)
    _, _, context = ours.denoise(context, call(changed_BC, [12], [4], [0]))
    fresh, _, _ = ours.denoise(context, call(changed_BC, [12], [4], [1]))
    assert not torch.allclose(fresh, stale, atol=1e-4)
