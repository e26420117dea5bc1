"""The page that replays a run: what is recorded, that nothing in it can break the page, and what a browser shows."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.sampling.engine.loop import StepEvent
from unmask.sampling.generate import generate
from unmask.sampling.jobs import as_loaded
from unmask.sampling.text import byte_alphabet, token_text
from unmask.sampling.trace import Trace, trace_for

SAMPLER = SamplerConfig(steps=8, max_new_tokens=16, block_size=8, eos="suppress")
EVIL = "</script><img src=x onerror=\"document.title='broken'\">{{data}}\u2028"
MASK, STOP = 257, 259


def event(
    nfe: int, answer: list[int], open_: list[bool], settled: set[int], sure: dict[int, float], **more
) -> StepEvent:
    """An event of one row in its only block."""
    size = len(answer)
    confidence_1C = torch.tensor([[sure.get(i, 0.0) for i in range(size)]])
    score_1C = torch.tensor([[sure.get(i, -math.inf) for i in range(size)]])
    values = {
        "rows": (0,),
        "lengths": (size,),
        "block_B": torch.tensor([0]),
        "end_B": torch.tensor([size]),
        "step_B": torch.tensor([nfe - 1]),
        "nfe_B": torch.tensor([nfe]),
        "answer_BC": torch.tensor([answer]),
        "masked_BC": torch.tensor([open_]),
        "committed_BC": torch.tensor([[i in settled for i in range(size)]]),
        "revised_BC": torch.zeros(1, size, dtype=torch.bool),
        "score_BC": score_1C,
        "confidence_BC": confidence_1C,
        "finished_B": torch.tensor([not any(open_)]),
    }
    return StepEvent(**(values | more))


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer):
    """The tests' tokenizer with a token (260) that would end a script."""
    more = copy.deepcopy(chat_tokenizer)
    more.add_tokens(["</script><b>&amp;"])
    return more


@pytest.fixture(scope="module")
def trace(tokenizer) -> Trace:
    """Three calls on seven positions: one given, a snowman of three tokens, one token taken back, a stop token."""
    facts = {"checkpoint": EVIL, "label": "approximate: dual cache", "seed": 5, "noise": "mask"}
    facts["sampler"] = {"steps": 3}
    trace = Trace(tokenizer, (STOP,), [EVIL], facts)
    (given,), snow, m = tokenizer.encode("g"), tokenizer.encode("☃"), MASK
    yes, no = True, False
    sure = {1: 0.2, 2: 0.5, 3: 0.97, 4: 0.95, 5: 0.6, 6: 0.99}
    trace(event(1, [given, m, m, snow[2], 260, m, STOP], [no, yes, yes, no, no, yes, no], {3, 4, 6}, sure))
    trace(event(2, [given, snow[0], m, m, 260, m, STOP], [no, no, yes, yes, no, yes, no], {1}, {1: 0.3, 5: 0.7}))
    done = [given, *snow, 260, tokenizer.encode("\n")[0], STOP]
    trace(event(3, done, [no] * 7, {2, 3, 5}, {2: 0.8, 3: 0.9, 5: 0.4}))
    return trace


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_tokens_are_text_or_the_bytes_of_a_part_of_a_character(tokenizer):
    assert [token_text(tokenizer, i) for i in tokenizer.encode("a \n")] == ["a", " ", "\n"]
    assert [token_text(tokenizer, i) for i in tokenizer.encode("é")] == [[0xC3], [0xA9]]
    assert token_text(tokenizer, STOP) == "<|endoftext|>" and token_text(tokenizer, 9999) == "⟨9999⟩"
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_a_replay_of_the_record_gives_the_answers(text_model, tokenizer):
    prompts = ["hi", "a longer one"]
    trace = trace_for(as_loaded(text_model, tokenizer, SAMPLER), prompts, checkpoint="c", seed=1)
    answers = generate(text_model, prompts, tokenizer=tokenizer, sampler=SAMPLER, seed=1, on_event=trace)
    data = data_of(trace.page())
    assert (data["noise"], data["seed"], data["label"], data["sampler"]["steps"]) == ("mask", 1, "exact", 8)
    for answer, prompt, row in zip(answers, prompts, data["rows"], strict=True):
        ids, open_ = [-1] * row["length"], [True] * row["length"]
        for call in row["calls"]:
            for first, *values in call.get("ids", ()):
                ids[first : first + len(values)] = values
            for first, *values in call.get("committed", ()):
                open_[first : first + len(values)] = [False] * len(values)
        assert ids[: len(answer.token_ids)] == answer.token_ids and not any(open_)
        assert (row["prompt"], row["text"], row["answer"]) == (prompt, answer.text, len(answer.token_ids))
        assert row["calls"][-1]["nfe"] == answer.stats.nfe and row["finished"]
        assert {str(token) for token in ids} <= data["tokens"].keys()


def test_what_was_given_and_what_was_taken_back_is_recorded(trace, tokenizer):
    (row,) = data_of(trace.page())["rows"]
    assert row["given"] == [[0, tokenizer.encode("g")[0]]]
    assert row["calls"][1]["remasked"] == [[3, 1]] and row["calls"][1]["committed"] == [[1, 1]]
    assert row["calls"][0]["sure"] == [[1, 200, 500, 970, 950, 600, 990]] and "scores" not in row["calls"][0]


def test_nothing_in_a_run_can_leave_its_place_in_the_page(trace):
    page = trace.page()
    assert page.count("</script>") == 2 and page.count("<script") == 2 and "<img" not in page
    data = data_of(page)
    assert data["checkpoint"] == data["rows"][0]["prompt"] == EVIL and data["tokens"]["260"] == "</script><b>&amp;"
    assert not re.search(r"https?://|src=[\"']|@import|url\(", page)


def test_a_page_that_cannot_be_written_is_one_line(trace, tmp_path):
    trace.write(tmp_path / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(SamplingError, match="--trace: .*nowhere.*No such file"):
        trace.write(tmp_path / "nowhere" / "a.html")


class Page(HTMLParser):
    """What a browser made of a page: texts by id, and the tokens' text, class and label."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tokens: list[tuple[str, set[str], str]] = []
        self._inside: list[str | None] = []
        self.feed(dom)

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        if tag not in ("meta", "input", "br", "img"):
            self._inside.append("title" if tag == "title" else values.get("id"))
        if values.get("role") == "option":
            self.tokens.append(("", set(values["class"].split()), values["aria-label"]))

    def handle_endtag(self, tag) -> None:
        self._inside.pop()

    def handle_data(self, data) -> None:
        for name in filter(None, self._inside):
            self.texts[name] = self.texts.get(name, "") + data
        if "tokens" in self._inside:
            text, names, label = self.tokens[-1]
            self.tokens[-1] = (text + data, names, label)


@pytest.fixture(scope="module")
def browse(open_page):
    """Return a function that opens a page in Chromium and returns what it shows."""
    return lambda page, address="": Page(open_page(page, address))


@pytest.mark.slow
def test_a_browser_shows_the_call_that_the_address_names(browse, trace):
    shown = browse(trace.page(), "#step=1")
    assert shown.texts["title"].startswith("</script><img") and shown.texts["checkpoint"] == EVIL
    assert shown.texts["prompt"].strip() == EVIL.strip() and "onerror" in shown.texts["prompt"]
    assert shown.texts["status"] == "Call 1 of 3, block 1: 3 tokens committed, 3 masked."
    facts = shown.texts["facts"]
    assert "approximate: dual cache" in facts and "Seed5" in facts and "(NFE)3" in facts and "forward2.00" in facts
    assert "steps3" in shown.texts["settings"] and "threshold" not in shown.texts["settings"]
    assert [text for text, _, _ in shown.tokens] == [
        "g", "░░", "▒▒", "⟨83⟩", "</script><b>&amp;", "▒▒", "<|endoftext|>"
    ]  # fmt: skip
    given, unsure, _, fresh, *_, stop = shown.tokens
    assert "given" in given[1] and given[2] == 'Position 0: token 70 "g", given.'
    assert "masked" in unsure[1] and unsure[2] == "Position 1: masked, confidence 0.200 in this call's token."
    assert "fresh" in fresh[1] and "committed in call 1, confidence 0.970." in fresh[2]
    assert {"past", "special"} <= stop[1]


@pytest.mark.slow
def test_a_browser_joins_the_bytes_of_a_character_and_marks_the_unsure(browse, trace):
    shown = browse(trace.page())
    assert shown.texts["status"] == "Call 3 of 3, block 1: 3 tokens committed, 0 masked."
    assert [text for text, _, _ in shown.tokens][:6] == ["g", "☃", "‿", "‿", "</script><b>&amp;", "↵\n"]
    assert "low" in shown.tokens[1][1] and "high" in shown.tokens[4][1] and "fresh" in shown.tokens[5][1]
    assert "committed in call 2, confidence 0.300." in shown.tokens[1][2]


@pytest.mark.slow
def test_keys_the_slider_and_the_choice_of_a_prompt_move_the_replay(browse, text_model, tokenizer):
    prompts = ["hi", "there"]
    trace = trace_for(as_loaded(text_model, tokenizer, SAMPLER), prompts, checkpoint="c", seed=1)
    generate(text_model, prompts, tokenizer=tokenizer, sampler=SAMPLER, on_event=trace)
    driver = """<p id="seen"></p><script>
      const seen = [], note = () => seen.push(find("status").textContent.split(/[,:]/)[0] + " " + location.hash);
      const key = (name, on = document.body) =>
        on.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
      key("Home"); note(); key("ArrowRight"); key("ArrowRight"); note(); key("ArrowLeft"); note(); key("End"); note();
      find("step").value = 4; find("step").dispatchEvent(new Event("input")); note();
      find("row").value = 1; find("row").dispatchEvent(new Event("change")); note();
      seen.push(find("prompt").textContent);
      find("tokens").children[0].focus(); key("ArrowRight", document.activeElement); note();
      seen.push(find("detail").textContent.split(":")[0]);
      find("play").click(); seen.push(find("play").textContent);
      const finish = () => { note(); seen.push(find("play").textContent); find("seen").textContent = seen.join("|"); };
      setTimeout(finish, 4800);
    </script></body>"""
    shown = browse(trace.page().replace("</body>", driver))
    assert shown.texts["seen"].split("|") == [
        "Before the first of 8 calls #row=1&step=0", "Call 2 of 8 #row=1&step=2", "Call 1 of 8 #row=1&step=1",
        "Call 8 of 8 #row=1&step=8", "Call 4 of 8 #row=1&step=4", "Call 8 of 8 #row=2&step=8", "there",
        "Call 8 of 8 #row=2&step=8", "Position 1", "Pause", "Call 8 of 8 #row=2&step=8", "Play",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_browser_shows_a_canvas_changing(browse, tokenizer):
    facts = {"checkpoint": "c", "label": "exact", "seed": 1, "noise": "uniform", "sampler": {}}
    trace = Trace(tokenizer, (STOP,), ["p"], facts)
    a, b, c, d = tokenizer.encode("abcd")
    begun = {"end_B": torch.tensor([2])}
    trace(event(1, [a, b, c, d], [True] * 4, set(), {0: 0.1, 1: 0.9}, **begun))
    trace(event(2, [c, b, c, d], [False, False, True, True], {0, 1}, {0: 0.9, 1: 0.9}, **begun))
    shown = browse(trace.page(), "#step=1")
    assert [text for text, _, _ in shown.tokens] == ["a", "b", "·", "·"]
    assert "noise" in shown.tokens[0][1] and "waiting" in shown.tokens[2][1]
    assert "still changing, confidence 0.100" in shown.tokens[0][2]


def test_a_token_that_was_written_over_has_its_own_confidence(text_model, tokenizer):
    sampler = SamplerConfig(steps=2, max_new_tokens=4, remasking="left_to_right", eos="suppress")
    trace = trace_for(as_loaded(text_model, tokenizer, sampler), ["a"], checkpoint="c", seed=1)
    events: list[StepEvent] = []
    generate(text_model, "a", tokenizer=tokenizer, sampler=sampler, on_event=events.append)
    first, last = events
    at = torch.tensor([[True, False, False, False]])
    edited = dataclasses.replace(
        last,
        revised_BC=at,
        answer_BC=last.answer_BC.masked_fill(at, 7),
        confidence_BC=last.confidence_BC.masked_fill(at, 0.5),
    )
    trace(first)
    trace(edited)
    ((row,),) = (data_of(trace.page())["rows"],)
    assert row["calls"][1]["sure"][0] == [0, 500] and row["calls"][1]["ids"][0] == [0, 7]
