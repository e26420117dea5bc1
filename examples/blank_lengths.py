"""A blank of unknown length: fill it with 1 to MOST tokens, score each, print them, the best last.

python examples/blank_lengths.py CHECKPOINT "The capital of" " is Paris." [MOST]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import unmask


@torch.no_grad()
def score(model: Any, filled: unmask.Infill, behind: list[int]) -> float:
    """Return (Σ log p(fill token) + Σ log p(token behind)) / (number of both), in nats.

    A fill token counts with the probability that the model gave it when it was committed; tokens behind the blank, with
    what one further call says that sees the fill and has all of them masked. Without these a blank that is too short
    wins too often: what begins like the right words is probable token by token. It is a heuristic, no likelihood of the
    whole text. A network without a mask (DiffusionGemma) is scored by the fill alone.
    """
    count = sum(map(len, filled.fill_ids))
    total = filled.log_likelihood * count
    mask_id = model.config.mask_token_id
    if mask_id is None or not behind:
        return total / count
    ids = torch.tensor([filled.prompt_ids + filled.token_ids])
    ids[0, -len(behind) :] = mask_id
    hidden = model(ids.to(next(model.parameters()).device))[0, -len(behind) :]
    logs = model.logits(hidden)[:, : model.config.vocab_size].float().log_softmax(dim=-1)
    return (total + float(logs[range(len(behind)), behind].sum())) / (count + len(behind))


def try_lengths(model: Any, tokenizer: Any, before: str, behind: str, most: int) -> list[tuple[float, unmask.Infill]]:
    """Return the text filled with 1 to `most` tokens, each with its score, by rising score."""
    texts = [f"{before}{{blank:{length}}}{behind}" for length in range(1, most + 1)]
    behind_ids = tokenizer.encode(behind, add_special_tokens=False)
    filled = unmask.infill(model, texts, tokenizer=tokenizer)
    return sorted(((score(model, each, behind_ids), each) for each in filled), key=lambda pair: pair[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("checkpoint", "folder or hub id"), ("before", "text before it"), ("behind", "text behind it")):
        parser.add_argument(name, help=text)
    parser.add_argument("most", type=int, nargs="?", default=6, help="most tokens of the blank; default: %(default)s")
    given = parser.parse_args()
    model, tokenizer = unmask.load_model(given.checkpoint), unmask.load_tokenizer(given.checkpoint)
    for value, filled in try_lengths(model, tokenizer, given.before, given.behind, given.most):
        print(f"{value:8.3f}  {len(filled.fill_ids[0])} tokens  {filled.text}")
