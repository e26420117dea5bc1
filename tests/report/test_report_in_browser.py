"""A report in a browser: its script runs, nothing lies on anything else, nothing is wider than the window."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from unmask.report.report import write_report

# What a browser makes of the page, written into it so that --dump-dom returns it.
LOOK = """<script>
const found={wide:document.documentElement.scrollWidth-innerWidth,overlaps:[],outside:[],
told:[...document.querySelectorAll('output')].map(o=>o.textContent),
answers:[...document.querySelectorAll('.answer')].map(a=>a.textContent),
paper:getComputedStyle(document.body).backgroundColor,ink:getComputedStyle(document.body).color};
for(const svg of document.querySelectorAll('svg')){
const texts=[...svg.querySelectorAll('text')].map(t=>[t.childNodes[0].textContent,t.getBoundingClientRect()]),
all=svg.getBoundingClientRect();
texts.forEach(([name,a],i)=>{
if(a.left<all.left-1||a.right>all.right+4)found.outside.push(svg.ariaLabel+': '+name);
for(const [other,b] of texts.slice(i+1))
if(a.left<b.right-1&&b.left<a.right-1&&a.top<b.bottom-3&&b.top<a.bottom-3)
found.overlaps.push(svg.ariaLabel+': '+name+' / '+other)})}
document.body.dataset.found=JSON.stringify(found)</script>"""


@pytest.fixture(scope="module")
def look(open_page: Callable[..., str]) -> Callable[..., dict]:
    """Return a function that opens a report in Chromium and returns what LOOK found."""

    def show(report: Path, width: int) -> dict:
        page = report.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>")
        shown = open_page(page, "", f"--window-size={width},900")
        found = re.search(r'data-found="([^"]*)"', shown)
        assert found, shown[-500:]
        return json.loads(unescape(found[1]))

    return show


def write_run(root: Path, shift: float, steps: int = 120) -> Path:
    """Write a run whose lines end close together, with long names."""
    root.mkdir(parents=True)
    events: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.2 + (6 + shift) * math.exp(-step / 30)
        events.append({"event": "train", "step": step, "loss": loss, "mdlm_loss": loss, "grad_norm": 20 / step,
                       "lr": 1e-5 * step, "tokens_per_second": 12345.6, "memory_gib": 70 + shift})  # fmt: skip
        if step % 20 == 0:
            events.append({"event": "validation", "step": step, "loss": loss,
                           "loss_by_noise_level": [loss * (1 + 0.01 * level) for level in range(5)]})  # fmt: skip
            events.append({"event": "exact_match", "step": step, "exact_match": step / steps, "right": 1, "total": 9})
    frames = [{"nfe": 1, "text": "░░░"}, {"nfe": 2, "text": "4░░"}, {"nfe": 3, "text": "4 <b>"}]
    sample = {"event": "sample", "step": 9, "row": "f:1", "prompt": "2 + 2?", "text": "4 <b>", "reference": "4",
              "correct": True, "nfe": 3, "frames": frames}  # fmt: skip
    for name, lines in (("metrics.jsonl", events), ("samples.jsonl", [sample])):
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_three_runs_are_readable(look: Callable[..., dict], tmp_path: Path, width: int) -> None:
    runs = [write_run(tmp_path / f"a_run_with_a_long_name_{n}", 0.1 * n) for n in range(3)]
    found = look(write_report(runs, tmp_path / "report.html"), width)
    assert found["overlaps"] == [] and found["outside"] == [] and found["wide"] <= 0
    assert found["told"] == ["network call 3 of 3"] * 3 and found["answers"] == ["4 <b>"] * 3
    assert found["paper"] != found["ink"]
