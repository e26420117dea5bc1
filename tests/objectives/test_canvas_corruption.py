"""Canvases and their noise: what is drawn, corrupted, filled up, attended and scored. No network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unmask.batch import Batch, CanvasBatch
from unmask.objectives.canvas import CanvasDiffusion, filled_rows, find_answers
from unmask.rng import NoiseStream

Turns = Callable[..., Batch]
Layout = list[tuple[int, bool]]
SIZE, VOCABULARY, EOS = 8, 40, 1
OBJECTIVE = CanvasDiffusion(SIZE, VOCABULARY, EOS)
ONE: Layout = [(3, False), (19, True)]

layouts = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(autouse=True)
def exact_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as long as they are; that rounding their length up changes no number has a test of its own."""
    monkeypatch.setattr("unmask.config.data.LENGTH_MULTIPLE", 1)


def layout_of(drawn: tuple[int, list[tuple[int, int]]], open_end: bool) -> Layout:
    """A prompt, then answers with a header after each; `open_end` leaves the last header out."""
    prompt, answers = drawn
    runs: Layout = [(prompt, False)]
    for length, header in answers:
        runs += [(length, True), (header, False)]
    return runs[:-1] if open_end else runs


def owners(noisy: CanvasBatch) -> list[int]:
    return list(range(len(noisy.starts))) if noisy.rows_K is None else noisy.rows_K.tolist()


def answers_of(runs: Layout) -> list[tuple[int, int]]:
    """(start, end) of each supervised run."""
    found, at = [], 0
    for length, supervised in runs:
        if supervised:
            found.append((at, at + length))
        at += length
    return found


@given(drawn=layouts, open_end=st.booleans(), cut=st.booleans(), seed=st.integers(0, 999))
def test_a_canvas_is_a_tile_of_its_answer(turns: Turns, drawn: list, open_end: bool, cut: bool, seed: int) -> None:
    """Any layout of answers: one canvas each, on its grid, with its tokens, EOS behind its end, in the rows' order."""
    rows = [layout_of(one, open_end) for one in drawn]
    batch = turns(rows, cut=[cut] * len(rows))
    noisy = OBJECTIVE.corrupt(batch, NoiseStream(seed))
    expected = [(row, start, end) for row, runs in enumerate(rows) for start, end in answers_of(runs)]
    assert owners(noisy) == [row for row, _, _ in expected]
    assert (noisy.rows_K is None) == (len(expected) == len(rows))
    for k, (row, start, end) in enumerate(expected):
        place, lost = noisy.starts[k] - start, cut and end == int(batch.attention_mask_BL[row].sum())
        assert place % SIZE == 0 and 0 <= place < end - start
        clean = batch.input_ids_BL[row, noisy.starts[k] : min(end, noisy.starts[k] + SIZE)].tolist()
        fill = SIZE - len(clean)
        assert noisy.targets_KC[k].tolist() == clean + [EOS] * fill
        assert noisy.scored_KC[k].tolist() == [True] * len(clean) + [not lost] * fill
        assert 0 <= int(noisy.canvas_ids_KC[k].min()) and int(noisy.canvas_ids_KC[k].max()) < VOCABULARY
        # What is not there is not corrupted either.
        assert torch.equal(noisy.canvas_ids_KC[k][~noisy.scored_KC[k]], noisy.targets_KC[k][~noisy.scored_KC[k]])
    assert (noisy.canvas_mask_KC is None) == bool(noisy.scored_KC.all())
    assert noisy.counts["diffusion"] == int(noisy.scored_KC.sum())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_every_canvas_of_an_answer_is_drawn_equally_often(length: int, turns: Turns) -> None:
    """Together they tile the answer; one alone is an unbiased estimate of their mean."""
    rows, blocks = 1500, -(-length // SIZE)
    noisy = OBJECTIVE.corrupt(turns([[(2, False), (length, True)]] * rows), NoiseStream(3))
    counted = Counter((start - 2) // SIZE for start in noisy.starts)
    assert set(counted) == set(range(blocks))
    expected = rows / blocks
    assert all(abs(count - expected) < 4 * expected**0.5 for count in counted.values())


def test_the_block_draw_never_leaves_the_answer(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest float32 below one times many blocks rounds up to their number."""
    top = torch.tensor(1 - 2**-24)
    monkeypatch.setattr(NoiseStream, "uniform", lambda *args: top.expand(len(args[3]), args[4]).clone())
    noisy = CanvasDiffusion(1, VOCABULARY, EOS).corrupt(turns([[(1, False), (3000, True)]]), NoiseStream(0))
    assert noisy.starts == (3000,)
    assert int(noisy.canvas_ids_KC.max()) < VOCABULARY


def test_a_last_canvas_is_filled_up_with_eos_that_is_read_corrupted_and_scored(turns: Turns) -> None:
    batch = turns([[(3, False), (10, True)], [(6, False), (1, True)]])
    noisy = OBJECTIVE.corrupt(batch, NoiseStream(0))
    # 3 + 10 is filled to 3 + 16, 6 + 1 to 6 + 8: the encoder reads that much, and learns to predict it.
    assert noisy.encoder_ids_BL.shape == (2, 19)
    assert noisy.encoder_ids_BL[0].tolist() == batch.input_ids_BL[0, :13].tolist() + [EOS] * 6
    assert noisy.encoder_ids_BL[1, :14].tolist() == batch.input_ids_BL[1, :7].tolist() + [EOS] * 7
    assert noisy.encoder_positions_N.tolist() == [*range(18), *range(19, 19 + 13)]
    expected = [*noisy.encoder_ids_BL[0, 1:].tolist(), *noisy.encoder_ids_BL[1, 1:14].tolist()]
    assert noisy.encoder_targets_N.tolist() == expected
    assert noisy.counts == {"diffusion": 16, "encoder": 18 + 13}
    many = OBJECTIVE.corrupt(turns([[(3, False), (10, True)]] * 800), NoiseStream(0))
    last = torch.tensor(many.starts) == 11
    assert 340 < int(last.sum()) < 460
    assert many.targets_KC[last, 2:].eq(EOS).all() and many.scored_KC.all()
    # Half of the tokens on average over the levels, EOS as any other.
    replaced = (many.canvas_ids_KC != many.targets_KC)[last].float().mean(0)
    assert ((0.4 < replaced) & (replaced < 0.6)).all()


def test_whole_canvases_need_no_fill(turns: Turns) -> None:
    batch = turns([[(3, False), (16, True)]])
    ids, attended = filled_rows(batch, find_answers(batch), SIZE, EOS)
    assert torch.equal(ids, batch.input_ids_BL) and attended.all()


def test_an_answer_that_lost_its_end_is_not_filled(turns: Turns) -> None:
    """What follows it is unknown: it is neither read nor scored, and its canvas is shorter."""
    seen = set()
    for epoch in range(30):
        noisy = OBJECTIVE.corrupt(turns([ONE, ONE], cut=[True, False], epoch=epoch), NoiseStream(0))
        assert noisy.encoder_positions_N.tolist() == [*range(21), *range(27, 27 + 26)]
        for row, there in ((0, 3), (1, SIZE)):
            if noisy.starts[row] == 3 + 16:
                seen.add(row)
                assert noisy.scored_KC[row].tolist() == [True] * there + [False] * (SIZE - there)
                assert noisy.targets_KC[row, 3:].tolist() == [EOS] * 5
        mask = noisy.scored_KC if noisy.canvas_mask_KC is None else noisy.canvas_mask_KC
        assert torch.equal(mask, noisy.scored_KC)
    assert seen == {0, 1}


def test_a_row_cut_within_a_users_turn_has_whole_answers(turns: Turns) -> None:
    noisy = OBJECTIVE.corrupt(turns([[(3, False), (5, True), (4, False)]], cut=[True]), NoiseStream(0))
    assert noisy.scored_KC.all() and noisy.targets_KC[0, 5:].eq(EOS).all()
    assert noisy.counts == {"diffusion": 8, "encoder": 11}


def test_the_fill_of_an_inner_answer_does_not_stand_before_the_next_turn(turns: Turns) -> None:
    """The encoder reads the conversation as it is; only the canvas has the fill."""
    batch = turns([[(3, False), (5, True), (4, False), (6, True)]])
    noisy = OBJECTIVE.corrupt(batch, NoiseStream(0))
    assert noisy.encoder_ids_BL[0].tolist() == batch.input_ids_BL[0].tolist() + [EOS] * 2
    assert noisy.starts == (3, 12) and noisy.rows_K is not None and noisy.rows_K.tolist() == [0, 0]
    assert noisy.targets_KC[0].tolist() == batch.input_ids_BL[0, 3:8].tolist() + [EOS] * 3
    assert noisy.targets_KC[1].tolist() == batch.input_ids_BL[0, 12:].tolist() + [EOS] * 2
    assert noisy.scored_KC.all() and noisy.counts["encoder"] == 19


def test_padding_is_neither_read_nor_scored(turns: Turns) -> None:
    batch = turns([[(3, False), (16, True)], [(2, False), (8, True)]], width=30)
    noisy = OBJECTIVE.corrupt(batch, NoiseStream(0))
    assert noisy.counts == {"diffusion": 16, "encoder": 18 + 9}
    assert max(noisy.encoder_positions_N[:18]) == 17 and noisy.encoder_positions_N[18:].tolist() == [*range(30, 39)]


ROWS: list[Layout] = [
    ONE,
    [(5, False), (8, True)],
    [(2, False), (30, True), (3, False), (4, True)],
    [(1, False), (1, True)],
    [(4, False), (9, True), (2, False), (12, True), (2, False), (3, True)],
    [(2, False), (50, True)],
]


@given(
    order=st.permutations(range(6)),
    split=st.integers(1, 5),
    padding=st.integers(0, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
    sampling=st.sampled_from(["iid", "stratified"]),
)
def test_noise_depends_on_seed_epoch_and_sample_alone(turns, order, split, padding, seed, epoch, sampling) -> None:
    objective = CanvasDiffusion(SIZE, VOCABULARY, EOS, time_sampling=sampling)

    def canvases(samples: list[int], padding: int) -> dict[tuple[int, int], tuple]:
        width = max(sum(length for length, _ in ROWS[n]) for n in samples) + padding
        batch = turns(
            [ROWS[n] for n in samples], samples=samples, width=width, epoch=epoch, slots=samples, global_rows=6,
            peers=range(6),
        )  # fmt: skip
        noisy = objective.corrupt(batch, NoiseStream(seed))
        conditioned = set() if noisy.conditioned_weight_S is None else {
            k for k, weight in zip(noisy.conditioned_S.tolist(), noisy.conditioned_weight_S.tolist(), strict=True)
            if weight
        }  # fmt: skip
        found = {}
        for k, row in enumerate(owners(noisy)):
            number = sum(key[0] == samples[row] for key in found)
            ids = noisy.canvas_ids_KC[k].tolist()
            found[samples[row], number] = (noisy.starts[k], ids, k in conditioned)
        return found

    whole = canvases(list(range(6)), 0)
    assert len(whole) == 9
    parts = canvases(order[:split], padding) | canvases(order[split:], 0)
    assert parts == whole


def test_noise_differs_between_seeds_scopes_epochs_and_samples(turns: Turns) -> None:
    def drawn(seed: int = 1, scope: str = "train", epoch: int = 0, sample: int = 4) -> tuple:
        batch = turns([[(3, False), (640, True)]], samples=[sample], epoch=epoch)
        noisy = CanvasDiffusion(64, 10**6, EOS, eps=0.5).corrupt(batch, NoiseStream(seed, scope))
        return noisy.starts, tuple(noisy.canvas_ids_KC.flatten().tolist())

    seen = {drawn(), drawn(seed=2), drawn(seed=1 + 2**32), drawn(scope="validation"), drawn(epoch=1), drawn(sample=5)}
    assert len(seen) == 6
    torch.manual_seed(123)
    assert drawn() in seen


def test_block_level_corruption_token_and_coin_are_independent(turns: Turns) -> None:
    """Measured on what comes out, for two answers a row: no pair of draws knows of each other."""
    rows, size = 3000, 32
    batch = turns([[(1, False), (8 * size, True), (1, False), (8 * size, True)]] * rows)
    noisy = CanvasDiffusion(size, 2**30, EOS).corrupt(batch, NoiseStream(5))
    coins = torch.zeros(2 * rows)
    assert noisy.conditioned_S is not None
    coins[noisy.conditioned_S] = 1.0
    assert torch.equal(coins[::2], coins[1::2])  # one coin a row
    assert float(coins.mean()) == pytest.approx(0.5, abs=0.04)
    replaced = (noisy.canvas_ids_KC != noisy.targets_KC).float()
    level = replaced.mean(1)
    block = (torch.tensor(noisy.starts).float() - torch.tensor([1.0, 2.0 + 8 * size] * rows)) / size
    # The share of replaced positions in the first half beyond what the level explains, and the tokens themselves.
    half = replaced[:, : size // 2].mean(1) - level
    token = (noisy.canvas_ids_KC * replaced).sum(1) / replaced.sum(1).clamp(min=1)
    token = torch.where(replaced.any(1), token, token[replaced.any(1)].mean())
    draws = [value.view(rows, 2).T for value in (block, level, half, token.float())]
    table = torch.cat([*draws, coins[None, ::2]])
    correlation = torch.corrcoef(table) - torch.eye(9)
    assert float(correlation.abs().max()) < 4.5 / rows**0.5
    # Nor in a way that a straight line does not see.
    straight = torch.cat((table[:4], coins[None, ::2]))  # blocks, levels, coin
    bent = (straight[:4] - straight[:4].mean(1, keepdim=True)).square()
    crossed = torch.corrcoef(torch.cat((straight, bent)))[:5, 5:]
    assert float(crossed[~torch.eye(5, 4, dtype=torch.bool)].abs().max()) < 4.5 / rows**0.5


def test_levels_are_uniform_and_tokens_cover_the_vocabulary(turns: Turns) -> None:
    rows, size = 600, 512
    noisy = CanvasDiffusion(size, 40, EOS, eps=0.1).corrupt(turns([[(1, False), (size, True)]] * rows), NoiseStream(2))
    replaced = noisy.canvas_ids_KC != noisy.targets_KC
    # A draw may equal the token itself, so one replacement in forty does not show. p = 0.9 t + 0.1.
    level = replaced.float().mean(1) * 40 / 39
    grid = 0.1 + 0.9 * (torch.arange(rows) + 0.5) / rows
    assert float((level.sort().values - grid).abs().max()) < 0.08
    counts = torch.bincount(noisy.canvas_ids_KC[replaced], minlength=40).float()
    # A token is never seen as a replacement of itself, so those of the answers come a little less often.
    assert float(counts.min()) > 0.8 * float(counts.mean()) and float(counts.max()) < 1.2 * float(counts.mean())


def test_stratified_levels_are_spread_over_the_global_batch(turns: Turns) -> None:
    rows, size = 8, 2048
    objective = CanvasDiffusion(size, 2**30, EOS, time_sampling="stratified")
    for epoch in range(5):
        slots = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))[:rows].tolist()
        batch = turns([[(1, False), (size, True)]] * rows, slots=slots, global_rows=16, epoch=epoch)
        noisy = objective.corrupt(batch, NoiseStream(0))
        level = (noisy.canvas_ids_KC != noisy.targets_KC).float().mean(1)
        middle = (torch.tensor(slots) + 0.5) / 16
        assert float((level - middle).abs().max()) < 0.5 / 16 + 0.05


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 3), (0.5, None)])
def test_the_first_pass_is_planned_for_conditioned_canvases_alone(share: float, expected, turns: Turns) -> None:
    rows: list[Layout] = [[(3, False), (5, True), (4, False), (6, True)], ONE]
    objective, sizes = CanvasDiffusion(SIZE, VOCABULARY, EOS, self_conditioning_p=share), set()
    for epoch in range(30):
        noisy = objective.corrupt(turns(rows, epoch=epoch), NoiseStream(0))
        if noisy.conditioned_S is None:
            assert noisy.conditioned_weight_S is None and noisy.conditioned_starts == ()
            sizes.add(0)
            continue
        assert noisy.conditioned_weight_S is not None and (noisy.conditioned_weight_S == 1).all()
        assert noisy.conditioned_starts == tuple(noisy.starts[k] for k in noisy.conditioned_S.tolist())
        sizes.add(len(noisy.conditioned_S))
    assert sizes == ({0, 1, 2, 3} if expected is None else {expected})


def test_a_rank_without_a_coin_joins_the_pass_of_the_others(turns: Turns) -> None:
    """The decision is a function of the rows that all ranks hold, so all of them come to the same."""
    coins = {
        sample: OBJECTIVE.corrupt(turns([ONE], samples=[sample]), NoiseStream(0)).conditioned_S is not None
        for sample in range(12)
    }
    heads, tails = (next(n for n in coins if coins[n] == wanted) for wanted in (True, False))
    for sample in (heads, tails):
        noisy = OBJECTIVE.corrupt(turns([ONE], samples=[sample], peers=[tails, heads]), NoiseStream(0))
        assert noisy.conditioned_S is not None and noisy.conditioned_weight_S is not None
        assert noisy.conditioned_S.tolist() == [0] and noisy.conditioned_starts == noisy.starts
        assert noisy.conditioned_weight_S.tolist() == [float(sample == heads)]
    alone = OBJECTIVE.corrupt(turns([ONE], samples=[tails], peers=[tails]), NoiseStream(0))
    assert alone.conditioned_S is None


def test_the_given_batch_is_not_changed(turns: Turns) -> None:
    batch = turns(ROWS)
    before = {name: value.clone() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    OBJECTIVE.corrupt(batch, NoiseStream(0))
    assert all(torch.equal(getattr(batch, name), copy) for name, copy in before.items())


def test_what_is_shown_of_a_row(turns: Turns) -> None:
    batch = turns([[(3, False), (5, True), (4, False), (6, True)], ONE], cut=[False, True])
    noisy = CanvasDiffusion(SIZE, 10**6, EOS, eps=0.5).corrupt(batch, NoiseStream(1))
    for row, canvas in ((0, 0), (1, 2)):
        shown = CanvasDiffusion(SIZE, 10**6, EOS).shown(noisy, row)
        there = noisy.scored_KC[canvas]
        changed = (noisy.canvas_ids_KC != noisy.targets_KC)[canvas][there].tolist()
        assert shown.changed == changed and any(changed) and not any(shown.hidden)
        assert shown.ids == noisy.canvas_ids_KC[canvas][there].tolist()
        assert f"position {noisy.starts[canvas]}: {sum(changed)} of {len(changed)} tokens" in shown.what
