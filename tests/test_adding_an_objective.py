"""Law: an objective is a class and two entries; one from outside the package, with no option at all, trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.batch import Batch, LossTerms, NoisyBatch, Pass, TokenLosses, Work
from unmask.config import config_from_mapping
from unmask.config.objective import MODES
from unmask.objectives.registry import OBJECTIVES, ObjectiveEntry, Shown
from unmask.objectives.terms import ScoredTerm, loss_terms, token_losses
from unmask.prepare import prepare
from unmask.preview import show_plan
from unmask.rng import NoiseStream


@dataclass(frozen=True)
class AllMasked:
    """Mask the whole answer and predict it."""

    mask_token_id: int

    def corrupt(self, batch: Batch, rng: NoiseStream) -> NoisyBatch:
        masked_BL = batch.supervised_BL
        noisy_BL = torch.where(masked_BL, self.mask_token_id, batch.input_ids_BL)
        positions_N = masked_BL.flatten().nonzero()[:, 0]
        counts = {"all_masked": float(masked_BL.sum())}
        ones_N = torch.ones(len(positions_N))
        return NoisyBatch(
            batch, noisy_BL, batch.attention_mask_BL, masked_BL, positions_N, masked_BL.float(), ones_N, counts
        )

    def loss(self, model: Any, noisy: NoisyBatch, counts: Mapping[str, float] | None = None) -> LossTerms:
        return loss_terms(model, self._scored(model, noisy), noisy.counts, counts)

    @torch.no_grad()
    def token_losses(self, model: Any, noisy: NoisyBatch) -> dict[str, TokenLosses]:
        return token_losses(model, self._scored(model, noisy), noisy.counts)

    def work(self, noisy: NoisyBatch) -> Work:
        rows, length = noisy.noisy_ids_BL.shape
        return Work((Pass(length, (0,) * rows),), len(noisy.positions_N))

    def shown(self, noisy: NoisyBatch, row: int) -> Shown:
        hidden = noisy.scored_BL[row].tolist()
        return Shown("everything masked", noisy.noisy_ids_BL[row].tolist(), hidden, [False] * len(hidden))

    def _scored(self, model: Any, noisy: NoisyBatch) -> dict[str, ScoredTerm]:
        hidden_ND = model(noisy.noisy_ids_BL, noisy.attention_mask_BL).flatten(0, 1)[noisy.positions_N]
        targets_N = noisy.clean.input_ids_BL.flatten()[noisy.positions_N]
        weights_N = noisy.weights_BL.flatten()[noisy.positions_N]
        return {"all_masked": ScoredTerm(hidden_ND, targets_N, weights_N, noisy.levels_N)}


@pytest.fixture(autouse=True)
def the_entries() -> Iterator[None]:
    """What a new objective adds beside its file."""
    entry = ObjectiveEntry(
        __name__, "AllMasked", noise="mask", attention="bidirectional", options=(),
        from_model={"mask_token_id": "mask_token_id"},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODES, "all_masked", {"mask_token_id": None})
        patch.setitem(OBJECTIVES, "all_masked", entry)
        yield


def test_it_trains_and_is_validated(tiny: Any, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    changes = {
        "dllm__mode": "all_masked", "validation_dataset": tiny.validation(), "step_scheduler__val_every_steps": 3,
    }  # fmt: skip
    done = train_tiny(tiny.config(tmp_path, **changes))
    events = [event for event in done.events if event["event"] == "validation"]
    assert [event["step"] for event in events] == [3, 6] and all(event["all_masked_loss"] > 0 for event in events)
    assert done.losses[6] < done.losses[1]


def test_a_dry_run_shows_it(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    show_plan(prepare(config_from_mapping(tiny.config(tmp_path, dllm__mode="all_masked"))), Console(width=200))
    assert "everything masked" in capsys.readouterr().out
