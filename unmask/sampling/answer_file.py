"""Answers to many prompts in a file: a record a row, each on the disk as soon as it is there.

While the job runs its records stand in `FILE.part`, with several processes in one file each; at the end they become
`FILE`, in the prompts' order. The same command goes on with a job that was interrupted, on any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from unmask.distributed.ranks import Ranks
from unmask.report.resumable import Record, append_records, as_line, resume_records, write_lines
from unmask.sampling.generate import Generation
from unmask.sampling.infill import Infill

KIND = "generation"


class AnswerFile:
    """The output of one job.

    Args:
        path: where the records go.
        rows: a text for each record, in their order, equal where the tokens asked for are.
        identity: what decides the answers beside the rows.
        ranks: the processes that share the job; all of them make one.

    Raises:
        ConfigError: `FILE.part` is of another job.
        CheckpointError: it cannot be written.
    """

    def __init__(self, path: Path, rows: Sequence[str], identity: Mapping[str, Any], ranks: Ranks) -> None:
        self.path, self.rows, self.ranks = path, rows, ranks
        self._own = self._part(ranks.rank)
        kept: list[Record] = []
        problem: Exception | None = None
        if ranks.first:
            others = sorted(set(path.parent.glob(f"{escape(path.name)}.part?*")) - {self._part(0)})
            others = [file for file in others if file.suffix.removeprefix(".part").isdigit()]
            try:
                kept = resume_records(self._part(0), KIND, self._identity(identity), self._units(), others)
            except Exception as error:  # the other ranks wait, and must hear of it
                problem = error
        kept, problem = ranks.gather((kept, problem))[0]
        if problem is not None:
            raise problem
        self.kept = {record["row"]: record for record in kept}
        if not ranks.first:
            write_lines(self._own, [json.dumps({KIND: self._identity(identity)}, ensure_ascii=False)])

    @property
    def open(self) -> list[int]:
        """Numbers of the prompts that have no answer yet."""
        return [row for row in range(len(self.rows)) if row not in self.kept]

    def add(self, row: int, record: Mapping[str, Any]) -> None:
        """Write an answer down; raises CheckpointError."""
        append_records(self._own, [{"row": row, **record}])

    def finish(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the file, of the answers that were there and those of this run; raises CheckpointError."""
        if self.ranks.first:
            found = {**self.kept, **{row: {"row": row, **record} for row, record in records.items()}}
            write_lines(self.path, [as_line(found[row]) for row in range(len(self.rows))])
        self.ranks.gather(None)  # a part is needed until the file is there
        self._own.unlink(missing_ok=True)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.part{rank or ''}")

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return {**identity, "prompts": sha256("\n".join(self.rows).encode()).hexdigest()[:16]}

    def _units(self) -> list[list[int]]:
        """Return equal rows together: what is drawn for one depends on how often it came before."""
        units: dict[str, list[int]] = {}
        for row, text in enumerate(self.rows):
            units.setdefault(text, []).append(row)
        return list(units.values())


def record_of(prompt: Any, answer: Generation | Infill, sampler: Mapping[str, Any], seed: int) -> Record:
    """Return what is kept of an answer.

    Args:
        prompt: what was asked, as in `generate` or `infill`.
        answer: what came out.
        sampler: the settings in force, and under `approximations` what of them is not computed by full forwards.
        seed: of the draws.
    """
    made: Record = {"text": answer.text, "token_ids": answer.token_ids}
    if isinstance(answer, Infill):
        made |= {"fills": answer.fills, "fill_ids": answer.fill_ids, "log_likelihood": answer.log_likelihood}
    else:
        made |= {"reasoning": answer.reasoning, "finish_reason": answer.finish_reason}
    return {
        "prompt": prompt,
        **made,
        "seed": seed,
        "sampler": dict(sampler),
        "nfe": answer.stats.nfe,
        "tokens_per_forward": round(answer.stats.tokens_per_forward, 3),
        "tokens_per_second": round(answer.stats.tokens_per_second, 3),
    }
