"""Outcomes as a table: a row for each task and number, a column for each model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from unmask.evaluation.results import Outcome
from unmask.report.evaluations import shown

_NO_TERMINAL = 10_000  # columns of a file or a pipe


def output_console(quiet: bool = False) -> Console:
    """Return a console on standard output; in a file or a pipe, lines are as long as they need, or as COLUMNS says."""
    console = Console(quiet=quiet)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _NO_TERMINAL
    return console


def outcome_table(labels: Sequence[str], outcomes: Sequence[Outcome]) -> Table:
    """Return the table of all outcomes, models in the order of `labels`."""
    table = Table(title=None, header_style="bold")
    table.add_column("task")
    table.add_column("measure")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        found = {outcome.label: _rows(outcome) for outcome in outcomes if outcome.task == task}
        measures = list(dict.fromkeys(measure for rows in found.values() for measure in rows))
        for number, measure in enumerate(measures):
            cells = [found.get(label, {}).get(measure, "") for label in labels]
            table.add_row(task if number == 0 else "", measure, *cells, end_section=number == len(measures) - 1)
    return table


def _rows(outcome: Outcome) -> dict[str, str]:
    """Return the lines of one outcome: what was measured and its value."""
    result = outcome.result
    timed = _seconds(outcome)
    if outcome.kind == "harness":
        return timed | {name: _with_error(value["value"], value["standard_error"]) for name, value in result.items()}
    if outcome.kind == "answers":
        return _answer_rows(result, outcome) | timed
    if "nats_per_token" in result:
        rows = {
            "bound, nats a token": _with_error(result["nats_per_token"], result["standard_error"]),
            "perplexity, bound's": _perplexity(result["perplexity_bound"], result["standard_error"]),
        }
    else:
        rows = {
            "denoising cross-entropy": _with_error(result["denoising_nats_per_token"], result["standard_error"]),
            "encoder, nats a token": shown(result["ar_nats_per_token"]),
            "encoder's perplexity": _perplexity(result["ar_perplexity"]),
        }
    return {**rows, "answers, tokens": f"{result['rows']}, {result['tokens']}", **timed}


def _seconds(outcome: Outcome) -> dict[str, str]:
    """Return the line of the time, or none; answers of an interrupted run, whose time is not known, are left out."""
    if outcome.seconds is None:
        return {}
    part = "" if outcome.timed_rows == len(outcome.records) else f" ({outcome.timed_rows} answers)"
    return {"seconds": f"{outcome.seconds:.1f}{part}"}


def _answer_rows(result: dict[str, Any], outcome: Outcome) -> dict[str, str]:
    rows = {
        "exact match": f"{100 * result['exact_match']:.1f} %",
        "95 % interval": f"{100 * result['low']:.1f} to {100 * result['high']:.1f}",
        "right": f"{result['right']} of {result['total']}",
        "ended by themselves": f"{100 * result['ended']:.0f} %",
        "network calls an answer": f"{result['network_calls']:.1f}",
    }
    for name, said in (("first", "against the first model"), ("against", "against --against")):
        if name in outcome.compared:
            found = outcome.compared[name]
            rows[said] = f"+{found['gained']} −{found['lost']}, {found['differing']} answers differ"
    return rows


def _with_error(value: float, error: float | None) -> str:
    return f"{shown(value, error)} ± {shown(error, error)}" if error else shown(value)


def _perplexity(value: float | None, error: float | None = None) -> str:
    """Return exp of nats a token with its error, which is `error`, of the nats, times as large as the perplexity."""
    return "over 1e304" if value is None else _with_error(value, error and error * value)
