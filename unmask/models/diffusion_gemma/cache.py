"""Rows of a store of keys and values as the network reads them: what canvases and further tokens see before them.

Shapes: B rows, S columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.models.diffusion_gemma.model import PADDING_POSITION, Encoded
from unmask.models.kv_cache import KeyValueStore


def stored(store: KeyValueStore, columns: int, lengths_B: Tensor) -> Encoded:
    """Return the store's first rows as encoded tokens, `lengths_B` of them in each; what follows is padding.

    It refers to the store, of which it has the first columns, and has no hidden states.
    """
    keys, values = ([tensor[: len(lengths_B), :, :columns] for tensor in each] for each in (store.keys, store.values))
    positions_S = torch.arange(columns, device=lengths_B.device)
    positions_BS = torch.where(positions_S < lengths_B[:, None], positions_S, PADDING_POSITION)
    no_hidden_BLD = keys[0].new_empty(len(lengths_B), 0, 0)
    return Encoded(tuple(keys), tuple(values), no_hidden_BLD, positions_BS, lengths_B, aligned=True)
