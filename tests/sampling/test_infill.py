"""Infilling: what is given stays, blanks get exactly their tokens, and what comes after a blank is seen."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.models.loading import load_model
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import StepEvent, denoise
from unmask.sampling.infill import _added, infill

TEXT = "the {blank:3} sat on {blank:5}, twice"


def fed_to(model) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    return seen


def test_given_text_stays_and_blanks_get_their_tokens(text_model, chat_tokenizer):
    (found,) = infill(text_model, TEXT, tokenizer=chat_tokenizer)
    assert [len(ids) for ids in found.fill_ids] == [3, 5]
    assert found.fills == [chat_tokenizer.decode(ids) for ids in found.fill_ids]
    assert found.text == f"the {found.fills[0]} sat on {found.fills[1]}, twice"
    parts = [chat_tokenizer.encode(part) for part in ("the ", " sat on ", ", twice")]
    assert found.token_ids == parts[0] + found.fill_ids[0] + parts[1] + found.fill_ids[1] + parts[2]
    assert found.prompt_ids == [] and found.stats.nfe == 8 and found.stats.tokens_per_forward == 1
    assert found.log_likelihood < 0


@pytest.fixture(scope="module")
def networks(small_model, gemma_folder) -> dict[str, tuple[torch.nn.Module, set[int]]]:
    """A network of each family for `chat_tokenizer`, and what it must not fill in."""
    ids = {"mask_token_id": 257, "eos_token_id": 259, "pad_token_id": 259}
    llada = small_model(vocab_size=260, embedding_size=264, **ids)
    return {"LLaDA": (llada, {257, 258, *range(259, 264)}), "DiffusionGemma": (load_model(str(gemma_folder)), {1, 7})}


CACHED = [("LLaDA", cache) for cache in ("none", "prefix", "dual")] + [
    ("DiffusionGemma", cache) for cache in ("block", "none")
]


@given(
    asked=st.sampled_from(CACHED),
    edits=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    given_text=st.lists(st.text("ab .", max_size=5), min_size=4, max_size=4),
    steps=st.integers(1, 6),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_whatever_is_asked_given_tokens_stay_and_blanks_get_allowed_ones(
    networks, chat_tokenizer, asked, edits, lengths, given_text, steps, seed
):
    family, cache = asked
    model, forbidden = networks[family]
    options = {"revise": "edit"} if edits and family == "LLaDA" else {}
    pieces = [f"x{given_text[0]}", *given_text[1 : len(lengths) + 1]]
    text = pieces[0] + "".join(f"{{blank:{n}}}{piece}" for n, piece in zip(lengths, pieces[1:], strict=True))
    sampler = SamplerConfig(steps=steps, cache=cache, **options)
    (found,) = infill(model, text, tokenizer=chat_tokenizer, sampler=sampler, seed=seed)
    assert [len(ids) for ids in found.fill_ids] == lengths
    parts = [chat_tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    filled = [ids + part for ids, part in zip(found.fill_ids, parts[1:], strict=True)]
    assert found.token_ids == parts[0] + [token for part in filled for token in part]
    assert not {token for ids in found.fill_ids for token in ids} & forbidden


def test_it_is_in_the_library_and_takes_lists(text_model, chat_tokenizer):
    texts = [TEXT, "a {blank:2}", "{blank:1} b"]
    together = unmask.infill(text_model, texts, tokenizer=chat_tokenizer, batch_size=2)
    assert together[1].text.startswith("a ") and together[2].text.endswith(" b")
    for text, found in zip(texts, together, strict=True):
        assert infill(text_model, text, tokenizer=chat_tokenizer)[0].token_ids == found.token_ids


def test_the_network_sees_the_text_after_a_blank(text_model, chat_tokenizer):
    seen = fed_to(text_model)
    infill(text_model, "ab{blank:2}cd", tokenizer=chat_tokenizer)
    a, b, c, d = chat_tokenizer.encode("abcd")
    assert seen[0].tolist() == [[a, b, 257, 257, c, d]]
    assert all(ids[0, [0, 1, 4, 5]].tolist() == [a, b, c, d] for ids in seen)


def test_a_spelt_mask_is_text_and_with_raw_it_is_a_token_that_is_given(text_model, chat_tokenizer):
    (text,) = infill(text_model, "x<|mask|>{blank:2}<|mask|>y", tokenizer=chat_tokenizer)
    assert 257 not in text.token_ids and text.text.count("<|mask|>") == 2
    events: list[StepEvent] = []
    (raw,) = infill(
        text_model, "x<|mask|>{blank:2}<|mask|>y", tokenizer=chat_tokenizer, raw=True, on_event=events.append
    )
    x, y = chat_tokenizer.encode("xy")
    assert raw.token_ids == [x, 257, *raw.fill_ids[0], 257, y] and 257 not in raw.fill_ids[0]
    assert [int(event.masked_BC.sum()) for event in events] == [1, 0]


def test_stop_tokens_are_never_filled_in_and_given_ones_end_nothing(text_model, chat_tokenizer):
    with torch.no_grad():
        text_model.transformer.ff_out.bias[[258, 259]] = 50.0
    (found,) = infill(text_model, "a{blank:2}<|eot_id|>b{blank:3}c", tokenizer=chat_tokenizer, raw=True)
    assert [len(ids) for ids in found.fill_ids] == [2, 3]
    assert found.token_ids.count(258) == 1 and 259 not in found.token_ids


def test_a_chat_is_rendered_up_to_the_text_and_closed_behind_it(text_model, chat_tokenizer):
    chat = [{"role": "user", "content": "say {blank:9}"}, {"role": "assistant", "content": "it is {blank:2}."}]
    seen = fed_to(text_model)
    (found,) = infill(text_model, [chat], tokenizer=chat_tokenizer)
    shown = chat_tokenizer.decode(seen[0][0].tolist())
    assert shown == ("<|start|>user\nsay {blank:9}<|eot_id|><|start|>assistant\nit is <|mask|><|mask|>.<|eot_id|>")
    assert found.text == f"it is {found.fills[0]}."
    assert chat_tokenizer.decode(found.prompt_ids).endswith("assistant\n")
    assert found.token_ids[:6] == chat_tokenizer.encode("it is ") and found.token_ids[-1:] == chat_tokenizer.encode(".")
    texts = [{"type": "text", "text": text} for text in ("it is {bla", "nk:2}.")]
    parts = [{"from": "human", "value": "say {blank:9}"}, {"role": "assistant", "content": texts}]
    for same in (chat, parts, {"messages": chat}, [{"conversations": parts}]):
        assert infill(text_model, same, tokenizer=chat_tokenizer)[0].token_ids == found.token_ids


def test_the_log_likelihood_is_that_of_the_calls_that_settled(text_model, chat_tokenizer):
    (found,) = infill(text_model, "a{blank:2}b", tokenizer=chat_tokenizer)
    a, b = chat_tokenizer.encode("ab")
    ids, logs = [a, 257, 257, b], []
    for _ in range(2):
        logits = text_model.logits(text_model(torch.tensor([ids])))[0].detach()
        logits[:, [257, 258, 259]] = -torch.inf
        sure, token = logits.log_softmax(-1).max(-1)
        place = max((place for place in (1, 2) if ids[place] == 257), key=lambda place: sure[place])
        ids[place] = int(token[place])
        logs.append(float(sure[place]))
    assert found.token_ids == ids
    assert found.log_likelihood == pytest.approx(sum(logs) / 2, rel=1e-4)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_blocks_count_from_the_first_blank_and_given_blocks_cost_nothing(text_model, chat_tokenizer, cache):
    events: list[StepEvent] = []
    sampler = SamplerConfig(block_size=4, steps=2, cache=cache)
    text = "before {blank:2}" + "x" * 17 + "{blank:6}."
    (found,) = infill(text_model, text, tokenizer=chat_tokenizer, sampler=sampler, on_event=events.append)
    # 25 columns: blanks at 0-1 and 19-24, in the blocks 0, 4 (one position), 5 (four) and 6 (one).
    assert [int(event.block_B[0]) for event in events] == [0, 4, 5, 6]
    assert [int(event.end_B[0]) for event in events] == [4, 20, 24, 26]
    assert "x" * 17 in found.text and found.stats.nfe == 4


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ("nothing", {}, "text 0: there is no blank"),
        (["{blank:1}", "{blank:0}"], {}, "text 1: {blank:0} needs a length"),
        ([[{"role": "user", "content": "{blank:2}"}]], {}, "ends in the assistant's message"),
        ("a {blank:200}", {}, "text 0: 202 tokens are over the model's max_sequence_length 128"),
        ("a {blank:999999999}", {}, "text 0: 1000000001 tokens are over"),  # before a list of that length is made
        ("{blank:2}", {"tokenizer": None}, "text 0: it needs a tokenizer"),
        ("{blank:2}", {"sampler": SamplerConfig(max_new_tokens=3)}, "max_new_tokens: blanks are filled"),
        ("{blank:2}", {"sampler": SamplerConfig(eos="suppress")}, "eos: blanks are filled"),
        ("{blank:2}", {"batch_size": 0}, "batch_size: must be"),
        ([7], {}, "expected a text or a chat"),
        ([{"role": "User", "content": "a"}, {"role": "assistant", "content": "{blank:2}"}], {}, "did you mean 'user'"),
        ({"prompt_ids": [1]}, {}, "token ids have no blanks"),
        ("{blank:2} \ud83d", {}, "text 0 holds half a surrogate pair"),
        (["{blank:2}", "a {blank:200}"], {"labels": ["f:1", "f:9"]}, "f:9: 202 tokens are over"),
        (["{blank:2}", "nothing"], {"labels": ["f:1", "f:9"]}, "f:9: there is no blank"),
        ("{blank:2}", {"labels": []}, "labels: 0 for 1 prompts"),
    ],
)
def test_bad_calls_are_refused(text_model, chat_tokenizer, texts, options, says):
    with pytest.raises(SamplingError) as error:
        infill(text_model, texts, **({"tokenizer": chat_tokenizer} | options))
    assert says in str(error.value)


def test_a_canvas_keeps_what_is_given_and_sees_what_follows(gemma_model, chat_tokenizer):
    events: list[StepEvent] = []
    (found,) = infill(
        gemma_model, 'a "{blank:3}" b {blank:2}.', tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=4),
        on_event=events.append,
    )  # fmt: skip
    assert found.text == f'a "{found.fills[0]}" b {found.fills[1]}.'
    assert [len(ids) for ids in found.fill_ids] == [3, 2]
    given = chat_tokenizer.encode('" b ')
    for event in events:
        assert event.answer_BC.shape == (1, 16)
        assert event.answer_BC[0, 3:7].tolist() == given
        assert event.answer_BC[0, 10:].tolist() == [1] * 6  # filled with end of text, as in training
    assert not {1, 7} & {token for ids in found.fill_ids for token in ids}
    other = infill(gemma_model, 'a "{blank:3}" c {blank:2}.', tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=4))
    assert other[0].fill_ids != found.fill_ids


def test_a_text_longer_than_a_canvas_goes_on_in_further_ones(gemma_model, chat_tokenizer):
    events: list[StepEvent] = []
    text = "go {blank:4}" + "x" * 50 + "{blank:4} end" + "y" * 20
    (found,) = infill(
        gemma_model, text, tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=2), on_event=events.append
    )
    # The blanks lie in canvas 0 and at columns 54-57, so canvases 1 and 2 are given and the last one is not there.
    assert {int(event.block_B[0]) for event in events} == {0, 3}
    assert events[0].answer_BC.shape == (1, 64)
    assert len(found.token_ids) == 3 + 4 + 50 + 4 + 4 + 20
    assert found.token_ids[-24:] == chat_tokenizer.encode(" end" + "y" * 20)
    assert chat_tokenizer.decode(found.token_ids[7:57]) == "x" * 50


def test_a_canvas_among_others_is_filled_as_alone(gemma_model, chat_tokenizer):
    texts = ["go {blank:4}" + "x" * 50 + "{blank:4}", "a {blank:2} b", "abc{blank:9}" + "z" * 30 + "{blank:1}"]
    sampler = SamplerConfig(steps=3)
    alone = [infill(gemma_model, text, tokenizer=chat_tokenizer, sampler=sampler)[0].token_ids for text in texts]
    for size in (2, 3):
        together = infill(gemma_model, texts, tokenizer=chat_tokenizer, sampler=sampler, batch_size=size)
        assert [one.token_ids for one in together] == alone


def test_a_canvas_needs_something_before_it(gemma_model, chat_tokenizer):
    with pytest.raises(SamplingError, match="text 0: a canvas needs something before it"):
        infill(gemma_model, "{blank:2} b", tokenizer=chat_tokenizer)


def test_what_a_canvas_is_told_of_given_positions_is_their_embedding(gemma_model, chat_tokenizer, monkeypatch):
    signals: list[torch.Tensor] = []
    decode = gemma_model.decode
    monkeypatch.setattr(gemma_model, "decode", lambda *a, **o: signals.append(a[2]) or decode(*a, **o))
    infill(gemma_model, "a{blank:2}bc", tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=2))
    assert not signals[0].any()
    b, c = chat_tokenizer.encode("bc")
    expected = gemma_model.stack.embed_tokens(torch.tensor([b, c, *[1] * 12]))
    torch.testing.assert_close(signals[1][0, 2:], expected)
    assert not torch.equal(signals[1][0, 0], gemma_model.stack.embed_tokens(torch.tensor(0)))


def test_a_canvass_likelihood_does_not_depend_on_the_temperature_of_its_calls(gemma_model, chat_tokenizer):
    found = [
        infill(gemma_model, "a{blank:3} b", tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=1, t_min=t, t_max=t))
        for t in (0.2, 0.8)
    ]
    assert found[0][0].token_ids == found[1][0].token_ids  # the noise of the only call is the same
    assert found[0][0].log_likelihood == pytest.approx(found[1][0].log_likelihood, rel=1e-4)
    assert found[0][0].log_likelihood < -1e-3


def test_a_fill_is_what_its_tokens_add_to_the_text():
    class Spaces:
        """Drops the space that a text begins with, as SentencePiece does."""

        def decode(self, ids, skip_special_tokens) -> str:
            return "".join(f" w{id}" if id < 9 else "\N{REPLACEMENT CHARACTER}" for id in ids).lstrip(" ")

    assert _added(Spaces(), [1, 2], [3, 4]) == " w3 w4"  # pyright: ignore[reportArgumentType]
    assert _added(Spaces(), [], [3]) == "w3"  # pyright: ignore[reportArgumentType]


def test_revising_that_can_do_nothing_is_refused(text_model, chat_tokenizer):
    sampler = SamplerConfig(revise="remask", steps=40)
    with pytest.raises(SamplingError, match="^revise: remask .* 40 steps for 4 tokens .* set threshold"):
        infill(text_model, "a{blank:4}", tokenizer=chat_tokenizer, sampler=sampler)
    infill(text_model, "a{blank:4}", tokenizer=chat_tokenizer, sampler=SamplerConfig(revise="remask", steps=2))


def test_the_key_of_a_text_of_known_length_is_that_of_its_tokens(text_model, chat_tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr("unmask.sampling.generate.denoise", lambda *a: asked.extend(a[1]) or denoise(*a))
    infill(text_model, ["a{blank:2}b", "a{blank:2}b"], tokenizer=chat_tokenizer)
    (a,), (b,) = chat_tokenizer.encode("a"), chat_tokenizer.encode("b")
    tokens = [a, 2**48, 2**48, b]
    assert [request.key for request in asked] == row_keys(42, [tokens, tokens])


def test_what_is_not_finite_is_called_by_its_text(text_model, chat_tokenizer):
    with torch.no_grad():
        text_model.transformer.ff_out.bias[5] = torch.nan
    with pytest.raises(SamplingError, match=r"not finite at f:9 \(block 1, step 1\); "):
        infill(text_model, ["a{blank:4}", "{blank:1}"], tokenizer=chat_tokenizer, batch_size=1, labels=["f:1", "f:9"])
    with pytest.raises(SamplingError, match=r"not finite at text 0 \(block 1, step 1\); "):
        infill(text_model, "a{blank:1}", tokenizer=chat_tokenizer)


def test_the_shortest_text_is_filled_first_and_told_at_once(text_model, chat_tokenizer):
    said: list[str] = []
    infill(
        text_model, ["one {blank:3}", "{blank:2}"], tokenizer=chat_tokenizer, batch_size=1,
        on_event=lambda event: said.extend(f"call of {row}" for row in event.rows if event.nfe_B[0] == 1),
        on_answer=lambda index, _: said.append(f"answer {index}"),
    )  # fmt: skip
    assert said == ["call of 1", "answer 1", "call of 0", "answer 0"]


def test_fills_depend_on_the_text_and_its_repeats_alone(text_model, chat_tokenizer):
    sampler = SamplerConfig(temperature=1.0)

    def fill(*texts: str) -> list[tuple[list[int], float]]:
        found = infill(text_model, list(texts), tokenizer=chat_tokenizer, sampler=sampler, batch_size=1)
        return [(one.token_ids, one.log_likelihood) for one in found]

    short, long = "cat {blank:3} the", "cat {blank:4} the"
    (first,), (second, third) = fill(short), fill(long, long)
    assert second != third
    assert fill(short, long, long) == [first, second, third]
    assert fill(long, short, long) == [second, first, third]


def test_the_example_takes_the_length_that_suits_the_text_behind_the_blank(text_model, chat_tokenizer):
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "blank_lengths.py"))
    tried = script["try_lengths"](text_model, chat_tokenizer, "a ", " b", 4)
    behind = chat_tokenizer.encode(" b")

    def rank(one) -> float:
        ids = one.token_ids[: -len(behind)] + [257] * len(behind)
        logs = text_model.logits(text_model(torch.tensor([ids])))[0].detach().log_softmax(-1)[-len(behind) :]
        filled = len(one.fill_ids[0])
        total = one.log_likelihood * filled + float(logs[range(len(behind)), behind].sum())
        return total / (filled + len(behind))

    assert sorted(len(one.fill_ids[0]) for _, one in tried) == [1, 2, 3, 4]
    assert [value for value, _ in tried] == pytest.approx(sorted(rank(one) for _, one in tried), rel=1e-4)
    assert tried[-1][1] == max((one for _, one in tried), key=rank)
