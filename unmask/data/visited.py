"""One number for the rows that training has been through, by which a resume tells whether they are what they were.

It is the sum of a hash of each row as read, modulo 2⁶⁴. So it does not depend on the order of the rows, nor on where
and how they are written, and it grows row by row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b

from unmask.data.conversation import Conversation
from unmask.data.sources import Rows
from unmask.errors import DataError

MODULUS = 2**64


def row_digest(conversation: Conversation) -> int:
    """Return the hash of a row, below MODULUS; keys that nothing reads do not count."""
    turns = [replace(turn, unread=()) for turn in conversation.messages]
    content = repr((conversation.tools, turns)).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def rows_digest(rows: Rows, indices: Iterable[int]) -> int:
    """Return the number of some rows; one that cannot be read counts 0, as when training left it out."""
    total = 0
    for index in indices:
        try:
            total += row_digest(rows[int(index)])
        except DataError:
            continue
    return total % MODULUS
