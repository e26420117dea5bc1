"""What a CUDA device alone can show (`make gpu`): each test compares with the CPU, whose tests hold to references."""

from __future__ import annotations

import pytest
import torch

from unmask.batch import Batch


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: these tests need one (`make test` runs what needs none)")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Four rows of unequal length, their first twelve tokens a prompt."""
    lengths_B = torch.tensor([64, 50, 33, 60])
    position_L = torch.arange(64)[None]
    real_BL = position_L < lengths_B[:, None]
    supervised_BL = real_BL & (position_L >= 12)
    ids_BL = torch.randint(10, 400, (4, 64), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids_BL=torch.where(real_BL, ids_BL, 0),
        supervised_BL=supervised_BL,
        attention_mask_BL=real_BL,
        answer_lengths_B=supervised_BL.sum(1),
        sample_ids_B=torch.arange(4),
        epoch=0,
        slots_B=torch.arange(4),
        global_rows=4,
        cut_B=torch.zeros(4, dtype=torch.bool),
        peers_P=torch.arange(4),
    )
