"""From a row to the tokens that training sees: render, tokenise, cut, or drop with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unmask.data.chat import ChatTemplate
from unmask.data.conversation import Conversation
from unmask.errors import DataError

if TYPE_CHECKING:
    from unmask.config.data import DatasetConfig
    from unmask.data.sources import Rows

TOO_LONG = "longer than seq_length, and truncation is off"
NOTHING_LEFT = "no supervised token within seq_length"
MALFORMED = "malformed"


@dataclass(frozen=True)
class EncodedRow:
    """A row of n tokens, n ≥ 1, at least one of them supervised.

    Attributes:
        input_ids: int64 (n,).
        supervised: bool (n,), True where the loss may look.
        cut: whether it lost its end to `seq_length`.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    cut: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Dropped:
    """A row that gives nothing to train on.

    Attributes:
        reason: the kind of reason, the same text for all rows of its kind, so that it can be counted.
        detail: what was wrong with this very row; "" when `reason` says all.
    """

    reason: str
    detail: str = ""


def encode_row(
    conversation: Conversation, template: ChatTemplate, config: DatasetConfig, seq_length: int
) -> EncodedRow | Dropped:
    """Return the tokens of a conversation, at most `seq_length` of them.

    A longer row loses its end; where that leaves no supervised token, or `config.truncation` is off, it is dropped.

    Raises:
        DataError: the template refuses the conversation.
    """
    encoded = template.encode(conversation.messages, config.mask_history, config.supervise_reasoning)
    too_long = len(encoded.ids) > seq_length
    if too_long and not config.truncation:
        return Dropped(TOO_LONG)
    supervised = np.array(encoded.supervised[:seq_length], dtype=bool)
    if not supervised.any():
        return Dropped(NOTHING_LEFT)
    return EncodedRow(np.array(encoded.ids[:seq_length], dtype=np.int64), supervised, cut=too_long)


@dataclass(frozen=True)
class RowEncoder:
    """Encodes row i of a source: what the loaders call, in this process or in a worker.

    Attributes:
        rows: the source.
        template: renders and supervises.
        config: the source's section.
        where: name of that section, for messages.
    """

    rows: Rows
    template: ChatTemplate
    config: DatasetConfig
    where: str = "dataset"

    def __call__(self, index: int) -> EncodedRow | Dropped:
        """Return row `index` as tokens.

        Raises:
            DataError: the row is malformed or refused by the template, and `on_malformed` is "error".
        """
        try:
            conversation = self.rows[index]
        except DataError as error:  # it names its place already
            if self.config.on_malformed == "error":
                raise
            return Dropped(MALFORMED, str(error))
        try:
            return encode_row(conversation, self.template, self.config, self.config.seq_length)
        except DataError as error:
            place = self.rows.describe(index)
            if self.config.on_malformed == "error":
                raise DataError(f"{place}: {error}; fix the row or set {self.where}.on_malformed: skip") from None
            return Dropped(MALFORMED, f"{place}: {error}")
