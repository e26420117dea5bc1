"""The benchmark's widened vocabulary: logits of a large one, answers of the small one."""

from __future__ import annotations

import pytest
import torch

import unmask
from benchmarks import trained_sampling
from unmask.models.llada.config import LLaDAConfig
from unmask.models.llada.model import LLaDA, initialise


def test_a_widened_vocabulary_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_sampling, "WIDE", 500)
    config = LLaDAConfig(
        d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=60, embedding_size=64, mask_token_id=59,
        eos_token_id=58, pad_token_id=58, max_sequence_length=64,
    )  # fmt: skip
    model = LLaDA(config)
    initialise(model, torch.Generator().manual_seed(0))
    wide = trained_sampling.widened(model.eval())
    assert wide.config.rows == 500
    sampler = unmask.SamplerConfig(steps=8, max_new_tokens=16, block_size=8)
    prompts = [[1, 2, 3], [4, 5]]
    narrow_ids, wide_ids = (
        [answer.token_ids for answer in unmask.generate(one, prompts, sampler=sampler)] for one in (model, wide)
    )
    assert narrow_ids == wide_ids
