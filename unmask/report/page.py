"""The frame of a report: one HTML text that needs nothing but itself, in light or dark as the reader's system asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5b636d;--rule:#d9dde2;--grid:#e8ebee;--paper:#fff;--panel:#f6f7f9;
--s0:#0a5ea8;--s1:#b8430b;--s2:#20713a;--s3:#7a3aa3;--s4:#8a6500;--s5:#4a4f57;--masked:#9aa1aa}
@media(prefers-color-scheme:dark){:root{--ink:#e5e8ec;--soft:#a0a8b2;--rule:#3a4048;--grid:#2a2f36;--paper:#15181c;
--panel:#1c2026;--s0:#6cb2f2;--s1:#f2935c;--s2:#6cc98a;--s3:#c79bea;--s4:#dcb950;--s5:#b8bfc8;--masked:#6a727c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:84rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.5rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--rule)}
h3{font-size:.95rem;margin:1.25rem 0 .4rem}
p{margin:.3rem 0 .8rem;max-width:60rem;overflow-wrap:anywhere}
.soft,.unit{color:var(--soft)}.unit{font-weight:400;font-size:.85em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1.25rem 2rem}
figure{margin:0}figcaption{font-weight:600;font-size:.92rem;margin-bottom:.2rem}
svg{display:block;width:100%;height:auto}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.32rem .8rem .32rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid);
overflow-wrap:break-word}
th{font-weight:600}thead th{border-bottom:1px solid var(--rule)}td.n,th.n{text-align:right}
tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
code,pre,.answer{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.85rem}
pre,.answer{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);border:1px solid var(--grid);
border-radius:4px;padding:.6rem .75rem;margin:.3rem 0;max-height:20rem;overflow:auto}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--soft)}
.player{display:flex;gap:.75rem;align-items:center;margin:.3rem 0;flex-wrap:wrap}.player input{width:min(22rem,60%)}
.answer i{font-style:normal;color:var(--masked)}
.sample{border-left:3px solid var(--rule);padding-left:1rem;margin:1.25rem 0}
@media print{body{max-width:none}details{display:block}}
"""

# Without a script an answer stands there complete; with one its steps can be gone through.
_SCRIPT = """
for(const box of document.querySelectorAll('[data-frames]')){
const frames=JSON.parse(document.getElementById(box.dataset.frames).textContent),slide=box.querySelector('input'),
say=box.querySelector('output'),text=box.parentElement.querySelector('.answer');
const show=()=>{const f=frames[slide.value];text.replaceChildren();
for(const part of f.text.split(/(░+)/)){if(part.startsWith('░')){const i=document.createElement('i');i.textContent=part;
text.append(i)}else text.append(part)}say.textContent='network call '+f.nfe+' of '+frames[frames.length-1].nfe};
slide.addEventListener('input',show);box.hidden=false;show()}
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return the whole page.

    Args:
        title: plain text.
        subtitle: plain text.
        sections: heading as plain text and body as HTML; those with an empty body are left out.
    """
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections if html)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p></header>{body}'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False) -> str:
    """Return a table; "" without rows.

    Args:
        columns: headings.
        rows: cells as plain values, the first of each row its heading.
        numbers: right-align all columns but the first.
    """
    if not rows:
        return ""
    kind = ' class="n"' if numbers else ""
    head = f"<th>{escape(columns[0])}</th>" + "".join(f"<th{kind}>{escape(name)}</th>" for name in columns[1:])
    lines = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td{kind}>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def folded(summary: str, html: str) -> str:
    """Return what a reader opens on demand; "" for nothing."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>" if html else ""


def answer(text: str, frames: Sequence[dict[str, Any]], name: str) -> str:
    """Return an answer, with a slider through its denoising steps where there are any.

    Args:
        text: the finished answer.
        frames: {"nfe", "text"} after each network call; `░` stands for a masked position.
        name: unique on the page.
    """
    shown = f'<div class="answer">{escape(text)}</div>'
    if len(frames) < 2:
        return f"<div>{shown}</div>"
    held = json.dumps([{"nfe": frame["nfe"], "text": frame["text"]} for frame in frames], ensure_ascii=False)
    return (
        f'<div><div class="player" data-frames="{name}" hidden><input type="range" min="0" max="{len(frames) - 1}" '
        f'value="{len(frames) - 1}" aria-label="step of the denoising"><output class="soft"></output></div>{shown}'
        f'<script type="application/json" id="{name}">{held.replace("<", chr(92) + "u003c")}</script></div>'
    )
