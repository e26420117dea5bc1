"""Surest tokens by tiles of the vocabulary against the same from whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise
from unmask.sampling.engine import surest
from unmask.sampling.engine.draws import KeyedDraws, Places
from unmask.sampling.engine.noise import MaskProcess, Weighed, Weighing
from unmask.sampling.engine.state import Tokens
from unmask.sampling.engine.surest import TiledHead
from unmask.sampling.family_settings import MaskSettings
from unmask.sampling.generate import generate
from unmask.sampling.settings import SamplerConfig

WIDTH = 16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_as_from_logits(hidden_MD: Tensor, weight_VD: Tensor, banned: tuple[int, ...], vocab_size: int) -> None:
    found = TiledHead(banned, vocab_size)(hidden_MD, weight_VD)
    logits_MV = torch.nn.functional.linear(hidden_MD, weight_VD)
    assert torch.equal(found.finite_M, logits_MV.sum(dim=-1).isfinite())
    logits_MV[:, [*banned, *range(vocab_size, len(weight_VD))]] = -torch.inf
    confidence_M, token_M = logits_MV.softmax(dim=-1).max(dim=-1)
    assert torch.equal(found.token_M, token_M)
    torch.testing.assert_close(found.confidence_M, confidence_M)
    torch.testing.assert_close(found.total_M, logits_MV.logsumexp(dim=-1))


@given(
    rows=st.integers(2, 9000),
    positions=st.integers(1, 40),
    padding=st.integers(0, 5000),
    banned=st.lists(st.integers(0, 8999), max_size=3),
    scale=st.sampled_from([1, 20, 400]),
    seed=st.integers(0, 2**31),
)
def test_equals_whole_logits(rows: int, positions: int, padding: int, banned: list[int], scale: int, seed: int) -> None:
    """Any size beside tiles of 4,096 and blocks of 512, a banned or padded tile or block among them.

    The largest logits lie near 0, or so far that exp of them overflows.
    """
    vocab_size = max(1, rows - padding)
    inside = tuple(sorted({token for token in banned if token < vocab_size}))
    inside = inside if len(inside) < vocab_size else ()
    # Whole numbers below 2^24 are exact in any order of addition; ties among them are many.
    hidden_MD = normal(positions, WIDTH, seed=seed).mul_(2).round_()
    assert_as_from_logits(hidden_MD, normal(rows, WIDTH, seed=seed + 1).round_() * scale, inside, vocab_size)


def test_a_whole_tile_may_be_banned() -> None:
    banned = tuple(range(4096, 8192))
    assert_as_from_logits(normal(3, WIDTH, seed=1), normal(9000, WIDTH, seed=2), banned, 9000)


def test_more_positions_than_are_made_at_once() -> None:
    assert_as_from_logits(normal(2 * surest.MOST + 7, WIDTH, seed=1), normal(700, WIDTH, seed=2), (5,), 700)


def test_finite_entries_may_have_products_that_are_not() -> None:
    weight_VD, hidden_MD = normal(600, WIDTH, seed=3), normal(4, WIDTH, seed=4)
    weight_VD[7], hidden_MD[2] = 1e20, 1e20
    assert TiledHead((), 600)(hidden_MD, weight_VD).finite_M.tolist() == [True, True, False, True]


def test_a_head_is_looked_at_anew_when_it_is_another() -> None:
    weight_VD, hidden_MD, head = normal(600, WIDTH, seed=3), normal(4, WIDTH, seed=4), TiledHead((), 600)
    assert head(hidden_MD, weight_VD).finite_M.all()
    broken_VD = weight_VD.index_fill(0, torch.tensor([7]), -torch.inf)
    assert not head(hidden_MD, broken_VD).finite_M.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_says_which_positions_are_not_finite(value: float) -> None:
    """Also minus infinity, which no maximum shows, at a token that is banned or not."""
    weight_VD, hidden_MD = normal(600, WIDTH, seed=3), normal(4, WIDTH, seed=4)
    broken_VD = weight_VD.clone()
    broken_VD[7, 0] = value
    hidden_MD[:, 0] = 1  # so that the sign of an infinity stays
    for banned in ((), (7,)):
        assert not TiledHead(banned, 600)(hidden_MD, broken_VD).finite_M.any()
    hidden_MD[2, 0] = value
    assert TiledHead((), 600)(hidden_MD, weight_VD).finite_M.tolist() == [True, True, False, True]


def test_its_memory_serves_any_number_of_positions() -> None:
    head, weight_VD = TiledHead((), 600), normal(600, WIDTH, seed=5)
    for positions in (9, 2, 30):
        hidden_MD = normal(positions, WIDTH, seed=positions)
        assert torch.equal(head(hidden_MD, weight_VD).token_M, (hidden_MD @ weight_VD.t()).argmax(dim=-1))


def weighed(
    settings: MaskSettings, positions: int, deferred: tuple[int, ...] = (), **other: torch.dtype
) -> Weighed | None:
    """Weigh random positions by the head; where it does, hold the outcome to that of its logits."""
    tokens = Tokens(stop=(), banned=(3,), deferred=deferred, mask=None)
    ids = torch.arange(positions)
    weighing = Weighing(Places(ids, torch.zeros_like(ids), ids), torch.zeros_like(ids), ids)
    process = MaskProcess(settings, tokens, 590, KeyedDraws())
    hidden_MD = normal(positions, WIDTH, seed=6).to(other.get("hidden", torch.bfloat16))
    weight_VD = normal(600, WIDTH, seed=7).to(other.get("weight", torch.bfloat16))
    bias_V = torch.zeros(600, dtype=other["bias"]) if "bias" in other else None
    by_head = process.weigh_head(hidden_MD, weight_VD, bias_V, weighing)
    if by_head is not None:
        by_logits = process.weigh((weight_VD @ hidden_MD.t()).t().contiguous(), weighing)
        for ours, theirs in zip(by_head.columns, by_logits.columns, strict=True):
            torch.testing.assert_close(ours, theirs)
    return by_head


@pytest.mark.parametrize("score", ["low_confidence", "random", "left_to_right"])
@pytest.mark.parametrize("deferred", [(), tuple(range(300))], ids=["", "deferred"])
def test_many_positions_are_weighed_as_by_their_logits(score: Any, deferred: tuple[int, ...]) -> None:
    assert weighed(MaskSettings(remasking=score), surest.FEWEST, deferred) is not None


def test_what_needs_logits_or_gains_nothing_takes_logits() -> None:
    """Unequal dtypes, too: autocast casts for a linear layer, not for a product with a place to be written to."""
    many = surest.FEWEST
    for settings in (
        MaskSettings(remasking="entropy"),
        MaskSettings(remasking="margin"),
        MaskSettings(temperature=0.5),
        MaskSettings(revise="remask"),
    ):
        assert weighed(settings, many) is None
    plain = MaskSettings()
    assert weighed(plain, many - 1) is None
    assert weighed(plain, many, hidden=torch.float32, weight=torch.float32) is None
    assert weighed(plain, many, hidden=torch.float16, weight=torch.float16) is None
    assert weighed(plain, many, weight=torch.float32) is None
    assert weighed(plain, many, bias=torch.bfloat16) is None


def test_a_batch_takes_that_way_and_gets_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLaDAConfig(
        d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=32, vocab_size=700, embedding_size=704,
        mask_token_id=699, eos_token_id=698, pad_token_id=698,
    )  # fmt: skip
    model = LLaDA(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.transformer.head.weight.mul_(8)  # clear preferences: bf16 rounds sums in another order otherwise
    model.to(torch.bfloat16)
    prompts = [[1 + row, 2, 3] for row in range(5)]
    sampler = SamplerConfig(steps=4, max_new_tokens=16, block_size=16)
    calls = []
    one_call = TiledHead.__call__
    monkeypatch.setattr(
        TiledHead, "__call__", lambda self, *given: calls.append(len(given[0])) or one_call(self, *given)
    )
    tiled = [answer.token_ids for answer in generate(model, prompts, sampler=sampler)]
    assert calls == [80]  # the first call weighs 5 × 16 positions, the later ones fewer than 64
    monkeypatch.setattr(surest, "FEWEST", 10**9)
    assert [answer.token_ids for answer in generate(model, prompts, sampler=sampler)] == tiled
    assert calls == [80]


@given(positions=st.integers(1, 3000))
def test_parts_are_multiples_but_for_the_last(positions: int) -> None:
    sizes = surest.part_sizes(positions)
    assert sum(sizes) == positions
    assert min(sizes) >= 1
    assert max(sizes) <= surest.MOST
    assert len(sizes) == -(-positions // surest.MOST)
    assert all(size % surest.MULTIPLE == 0 for size in sizes[:-1])
    assert max(sizes) - sizes[-1] < 2 * surest.MULTIPLE


@pytest.mark.parametrize("logit", [1.0, 7.9, 30.0, 60.0])
def test_no_token_is_surer_than_sure(logit: float) -> None:
    """However the exponentials round, which they do the more the larger the logits are."""
    weight_VD = torch.full((600, 1), -100.0)
    weight_VD[3] = 1.0
    hidden_MD = torch.full((surest.FEWEST, 1), logit)
    found = TiledHead((), 600)(hidden_MD.bfloat16(), weight_VD.bfloat16())
    assert (found.token_M == 3).all()
    assert (found.confidence_M <= 1).all()
    torch.testing.assert_close(found.confidence_M, torch.ones(surest.FEWEST), rtol=0, atol=2e-6)
