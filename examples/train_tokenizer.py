"""Train a tokenizer for a model made from scratch:  python examples/train_tokenizer.py CHAT.jsonl OUTPUT_DIR [VOCAB]"""

from __future__ import annotations

import sys

from unmask.config.data import DatasetConfig
from unmask.data.sources import open_rows
from unmask.models.llada.family import FAMILY
from unmask.models.tokenizer import train_tokenizer

if __name__ == "__main__":
    source, output, *rest = sys.argv[1:]
    rows = open_rows(DatasetConfig(source))
    texts = (message.content for index in range(len(rows)) for message in rows[index].messages)
    assert FAMILY.control_tokens is not None
    tokenizer = train_tokenizer(texts, int(rest[0]) if rest else 4096, FAMILY.control_tokens)
    tokenizer.save_pretrained(output)
    print(f"wrote {output} ({len(tokenizer)} ids)")
