from __future__ import annotations

import torch

from unmask.ops.ragged import concat_padded, pad_rows


def test_rows_of_ids_are_padded_to_the_longest():
    assert pad_rows([[1, 2, 3], [], [4]], value=9).tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert pad_rows([[], []]).shape == (2, 0) and pad_rows([]).shape == (0, 0)
    assert pad_rows([[]]).dtype == torch.long


def test_rows_of_unlike_width_stand_one_behind_the_other_in_any_dimension():
    one, other = torch.ones(2, 3), torch.full((1, 1), 2.0)
    assert concat_padded([one, other], -1).tolist() == [[1, 1, 1], [1, 1, 1], [2, -1, -1]]
    deep = concat_padded([torch.ones(1, 2, 1, 4), torch.ones(2, 2, 3, 4)], dim=2)
    assert deep.shape == (3, 2, 3, 4) and deep[0, :, 1:].eq(0).all() and deep[1:].eq(1).all()
    assert concat_padded([torch.tensor([[True]]), torch.ones(1, 2, dtype=torch.bool)]).dtype == torch.bool
