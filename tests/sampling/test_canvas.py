"""DiffusionGemma in the denoising loop: the loop's laws on canvases of random tokens."""

from __future__ import annotations

import io
import itertools
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import Tensor

from unmask.cli import main
from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.models.diffusion_gemma.cache import stored
from unmask.models.diffusion_gemma.family import FAMILY as DIFFUSION_GEMMA
from unmask.sampling.backends.backend import backend_for
from unmask.sampling.engine.draws import row_keys
from unmask.sampling.engine.loop import Request, StepEvent, denoise
from unmask.sampling.generate import generate
from unmask.sampling.settings import family_settings, settings_for
from unmask.sampling.view import Drawing, watch

CanvasSettings = partial(family_settings, DIFFUSION_GEMMA, block_size=256)

# At low temperatures the network is sure, so canvases stop before their last step and rows at different times.
SURE = {"steps": 12, "entropy_bound": 30.0, "confidence_threshold": 0.5, "t_min": 0.02, "t_max": 0.2}
SHORT = SamplerConfig(steps=3, max_new_tokens=20, eos="suppress")


def tokens(answers) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def prompts_of(*lengths: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(5)
    return [torch.randint(8, 300, (length,), generator=numbers).tolist() for length in lengths]


def answers(model, requests: list[Request], settings: CanvasSettings) -> dict[int, tuple[list[int], int]]:
    """Each request's tokens up to a stop, and its network calls."""
    found = {}
    for event in denoise(backend_for(model), requests, settings):
        for place in event.finished_B.nonzero()[:, 0].tolist():
            committed = int((~event.masked_BC[place]).sum())
            found[event.rows[place]] = (event.answer_BC[place, :committed].tolist(), int(event.nfe_B[place]))
    return found


def test_a_row_alone_equals_the_row_in_any_batch_and_order(gemma_model):
    prompts = prompts_of(3, 30, 1, 12)
    keys = row_keys(0, prompts)
    requests = [Request(i, prompt, key) for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True))]
    settings = CanvasSettings(max_new_tokens=24, block_size=16, **SURE)
    alone = {
        index: answer for request in requests for index, answer in answers(gemma_model, [request], settings).items()
    }
    assert len({calls for _, calls in alone.values()}) > 1  # rows stop at different times
    for batch in (requests, requests[::-1], [requests[3], requests[0]]):
        assert answers(gemma_model, batch, settings) == {request.index: alone[request.index] for request in batch}


def test_the_same_seed_is_the_same_answer_and_another_seed_another(gemma_model):
    prompts = prompts_of(2, 5)
    first = tokens(generate(gemma_model, prompts, sampler=SHORT, seed=1))
    state = torch.random.get_rng_state()
    assert first == tokens(generate(gemma_model, prompts, sampler=SHORT, seed=1))
    assert first != tokens(generate(gemma_model, prompts, sampler=SHORT, seed=2))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_an_answer_has_exactly_the_tokens_asked_for(gemma_model, length):
    sampler = SamplerConfig(steps=2, max_new_tokens=length, eos="suppress")
    events: list[StepEvent] = []
    (answer,) = generate(gemma_model, [5, 6], sampler=sampler, on_event=events.append)
    assert len(answer.token_ids) == length and answer.finish_reason == "length"
    assert not set(answer.token_ids) & {1, 7}
    assert answer.stats.nfe == len(events) == 2 * -(-length // 16)
    assert all(event.answer_BC.shape == event.masked_BC.shape == (1, length) for event in events)
    longer = generate(gemma_model, [5, 6], sampler=SamplerConfig(steps=2, max_new_tokens=48, eos="suppress"))[0]
    assert answer.token_ids == longer.token_ids[:length]  # the last canvas is denoised whole, then cut


def test_settings_come_from_the_checkpoint(gemma_model):
    assert gemma_model.generation["max_denoising_steps"] is None  # as transformers writes a fresh one
    gemma_model.generation = {"max_denoising_steps": 2, "max_new_tokens": 20, "eos_token_id": [299]}
    events: list[StepEvent] = []
    (answer,) = generate(gemma_model, [5, 6], on_event=events.append)
    assert len(events) == 4 and len(answer.token_ids) == 20
    (other,) = generate(gemma_model, [5, 6], sampler=SamplerConfig(steps=3))
    assert other.stats.nfe == 6


def test_any_of_the_end_tokens_ends_an_answer(gemma_model):
    sampler = SamplerConfig(steps=3, max_new_tokens=40)
    gemma_model.generation = {"eos_token_id": []}
    (whole,) = generate(gemma_model, [5, 6], sampler=sampler)
    assert len(whole.token_ids) == 40
    for place in (3, 20):
        token = whole.token_ids[place]
        first = whole.token_ids.index(token)
        gemma_model.generation = {"eos_token_id": [2, token]}
        (ended,) = generate(gemma_model, [5, 6], sampler=sampler)
        assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[:first], "eos")
        assert ended.stats.nfe == 3 * (first // 16 + 1)


def test_nothing_is_latched_until_the_canvas_stops(gemma_model):
    events: list[StepEvent] = []
    generate(
        gemma_model, [5], sampler=SamplerConfig(steps=6, max_new_tokens=32, eos="suppress"), on_event=events.append
    )
    for step, event in enumerate(events):
        canvas = slice(0, 16) if step < 6 else slice(16, 32)
        assert int(event.end_B[0]) == canvas.stop
        assert event.committed_BC[0, canvas].all() == (step % 6 == 5)
        assert event.score_BC[0, canvas].isfinite().all() and event.score_BC.isfinite().sum() == 16
    canvases = torch.stack([event.answer_BC[0, :16] for event in events[:5]])
    assert (canvases[1:] != canvases[:-1]).any(dim=1).all()
    assert torch.equal(events[5].answer_BC[0, :16], events[-1].answer_BC[0, :16])


class Calls:
    """Records what the network is asked."""

    def __init__(self, model, monkeypatch) -> None:
        self.encoded: list[tuple[int, ...]] = []
        self.decoded: list[tuple[int, ...]] = []
        self.signals: list[Tensor] = []
        encode, decode = model.encode, model.decode

        def encoding(ids, *args, **options):
            self.encoded.append(tuple(ids.shape))
            return encode(ids, *args, **options)

        def decoding(ids, encoded, signal, **options):
            self.decoded.append(tuple(ids.shape))
            self.signals.append(signal)
            return decode(ids, encoded, signal, **options)

        monkeypatch.setattr(model, "encode", encoding)
        monkeypatch.setattr(model, "decode", decoding)


def test_clean_tokens_are_encoded_once_and_a_call_runs_canvases_alone(gemma_model, monkeypatch):
    calls = Calls(gemma_model, monkeypatch)
    generate(gemma_model, prompts_of(9, 4), sampler=SamplerConfig(steps=3, max_new_tokens=33, eos="suppress"))
    assert calls.encoded == [(2, 9), (2, 16), (2, 16)]  # the last canvas has nothing after it
    assert calls.decoded == [(2, 16)] * 9


def test_a_finished_row_leaves_and_is_not_encoded(gemma_model, monkeypatch):
    sampler = SamplerConfig(max_new_tokens=24, **SURE)
    prompts = prompts_of(3, 30, 1, 12)
    alone = [generate(gemma_model, prompt, sampler=sampler)[0] for prompt in prompts]
    calls = Calls(gemma_model, monkeypatch)
    generate(gemma_model, prompts, sampler=sampler)
    assert sum(rows for rows, _ in calls.decoded) == sum(answer.stats.nfe for answer in alone)
    canvases = [(len(a.token_ids) if a.finish_reason == "eos" else 23) // 16 for a in alone]
    assert sum(rows for rows, _ in calls.encoded) == len(prompts) + sum(canvases)


def test_every_canvas_begins_without_a_signal_and_then_has_one(gemma_model, monkeypatch):
    calls = Calls(gemma_model, monkeypatch)
    generate(gemma_model, [5], sampler=SamplerConfig(steps=3, max_new_tokens=32, eos="suppress"))
    assert [bool(signal.any()) for signal in calls.signals] == [False, True, True] * 2


def test_no_call_records_a_graph(gemma_model, monkeypatch):
    """Not the encoder's at the end of a canvas either: its keys and values would keep every canvas's activations."""
    modes = []
    for name in ("encode", "decode", "logits"):
        call = getattr(gemma_model, name)
        monkeypatch.setattr(
            gemma_model, name, lambda *a, call=call, **o: modes.append(torch.is_grad_enabled()) or call(*a, **o)
        )
    assert all(parameter.requires_grad for parameter in gemma_model.parameters())
    generate(gemma_model, prompts_of(9, 4), sampler=SamplerConfig(steps=2, max_new_tokens=33, eos="suppress"))
    assert len(modes) > 10 and not any(modes)


def test_the_signal_is_the_soft_embedding_of_the_tempered_logits(gemma_model, monkeypatch):
    calls, hidden = Calls(gemma_model, monkeypatch), []
    decode = gemma_model.decode
    monkeypatch.setattr(gemma_model, "decode", lambda *a, **o: hidden.append(decode(*a, **o)) or hidden[-1])
    generate(gemma_model, [5], sampler=SamplerConfig(steps=4, max_new_tokens=16, eos="suppress", t_min=0.4, t_max=0.8))
    for step, temperature in enumerate([0.8, 0.7, 0.6]):
        logits = gemma_model.logits(hidden[step])
        logits[..., [1, 7]] = -torch.inf  # suppressed
        torch.testing.assert_close(
            calls.signals[step + 1], gemma_model.soft_embedding(logits / temperature), rtol=1e-4, atol=1e-4
        )


def test_encoding_canvas_by_canvas_equals_encoding_everything(gemma_model):
    backend = backend_for(gemma_model)
    prompts = prompts_of(3, 20, 7)
    answer = torch.randint(0, 300, (3, 48), generator=torch.Generator().manual_seed(2))
    context = backend.prefill(prompts)
    block = torch.tensor([0, 0, 0])
    for done in ([True, False, True], [False, True, False], [True, True, False]):
        context = backend.commit(context, answer, block * 16, block * 16 + 16, torch.tensor(done))
        block = block + torch.tensor(done)
    context = context.select(torch.tensor([True, False, True]))
    canvas = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor(context.lengths)
    found = gemma_model.decode(canvas, stored(context.store, max(context.lengths), lengths), starts=context.lengths)
    for place, (row, canvases) in enumerate([(0, 2), (2, 1)]):
        clean = torch.tensor([prompts[row] + answer[row, : 16 * canvases].tolist()])
        assert context.lengths[place] == clean.shape[1]
        expected = gemma_model.decode(canvas[place : place + 1], gemma_model.encode(clean))
        torch.testing.assert_close(found[place], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["block", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_join_and_leave_and_finish_canvases_hold_what_a_fresh_encoding_does(seed, cache, gemma_model):
    settings = settings_for(gemma_model, SamplerConfig(cache=cache))
    backend, numbers = backend_for(gemma_model, settings), torch.Generator().manual_seed(seed)

    def some(most: int) -> int:
        return int(torch.randint(most, (), generator=numbers))

    context = backend.prefill(prompts_of(3, 20, 7))
    for _ in range(12):
        rows, turn = len(context.ids), some(3)
        if turn == 0 or rows == 0:
            context = context.concat(backend.prefill(prompts_of(*[1 + some(25) for _ in range(1 + some(2))])))
        elif turn == 1 and rows > 1:
            context = context.select(torch.rand(rows, generator=numbers) < 0.7)
        elif max(context.lengths) < 90:
            done = torch.rand(rows, generator=numbers) < 0.6
            done[some(rows)] = True
            first, answer = torch.zeros(rows, dtype=torch.long), torch.randint(0, 300, (rows, 32), generator=numbers)
            context = backend.commit(context, answer, first, first + 16 * (1 + some(2)), done)
    canvases = torch.randint(0, 300, (len(context.ids), 16), generator=numbers)
    bounds = (min(context.lengths), max(context.lengths))
    encoded = stored(context.store, bounds[1], torch.tensor(context.lengths))
    found = gemma_model.decode(canvases, encoded, bounds=bounds)
    for row, ids in enumerate(context.ids):
        expected = gemma_model.decode(canvases[row : row + 1], gemma_model.encode(torch.tensor([ids])))
        torch.testing.assert_close(found[row], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["block", "none"])
def test_finished_canvases_are_written_where_there_is_room_and_nothing_is_copied(cache, gemma_model, monkeypatch):
    monkeypatch.setattr("unmask.sampling.backends.canvas._COLUMNS", 64)
    backend = backend_for(gemma_model, settings_for(gemma_model, SamplerConfig(cache=cache)))
    context = backend.prefill(prompts_of(3, 9))
    answer, first, where = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, dtype=torch.long), []
    for _ in range(7):
        context = backend.commit(context, answer, first, first + 16, torch.tensor([True, True]))
        tensors = (*context.store.keys, *context.store.values)
        where.append([tensor.data_ptr() for tensor in tensors])
        assert context.store.columns == (64 if max(context.lengths) <= 64 else 128)
    moves = sum(before != after for before, after in itertools.pairwise(where))
    assert context.lengths == (115, 121) and moves == 1


def test_logits_are_made_in_chunks_whose_size_changes_nothing(gemma_model, monkeypatch):
    prompts, sampler = prompts_of(2, 5), SamplerConfig(steps=3, max_new_tokens=20)
    whole = tokens(generate(gemma_model, prompts, sampler=sampler))
    monkeypatch.setattr("unmask.sampling.engine.loop._LOGITS_AT_ONCE", 300 * 5)
    widths = []
    logits = type(backend_for(gemma_model)).logits
    monkeypatch.setattr(
        "unmask.sampling.backends.canvas.CanvasBackend.logits",
        lambda self, hidden: widths.append(len(hidden)) or logits(self, hidden),
    )
    assert tokens(generate(gemma_model, prompts, sampler=sampler)) == whole
    assert max(widths) == 5


def test_logits_that_are_not_finite_stop_with_the_place_named(gemma_model):
    with torch.no_grad():
        gemma_model.stack.layers[0].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(SamplingError, match=r"not finite at prompt 0 \(block 1, step 1\); check the checkpoint"):
        generate(gemma_model, [1, 2], sampler=SHORT)


def test_a_prompt_that_fills_the_context_is_refused(gemma_model):
    with pytest.raises(
        SamplingError, match=r"prompt 1: 100 tokens and max_new_tokens=20 \(2 whole canvases\) make 132, over .* 128"
    ):
        generate(gemma_model, prompts_of(3, 100), sampler=SHORT)
    assert len(generate(gemma_model, prompts_of(96), sampler=SHORT)[0].token_ids) == 20


def test_bf16_networks_sample(gemma_model):
    found = generate(gemma_model.bfloat16(), prompts_of(2, 5), sampler=SHORT)
    assert [len(answer.token_ids) for answer in found] == [20, 20]


def test_the_current_canvas_is_drawn_dimmed_and_the_next_not_at_all(gemma_model, chat_tokenizer):
    drawn = Drawing(chat_tokenizer, (), None).draw(
        chat_tokenizer.encode("abc"), [False, True, True], [True, False, False]
    )
    assert drawn.plain == "abc" and [span.style for span in drawn.spans] == ["bold", "dim"]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=400, color_system=None)
    gemma_model.generation = {"eos_token_id": [299]}
    (answer,) = watch(gemma_model, "hi", chat_tokenizer, SamplerConfig(steps=2, max_new_tokens=32), console, raw=True)
    expected = generate(
        gemma_model, "hi", tokenizer=chat_tokenizer, sampler=SamplerConfig(steps=2, max_new_tokens=32), raw=True
    )[0]
    assert answer.token_ids == expected.token_ids and "░" not in out.getvalue()


@pytest.fixture
def checkpoint(gemma_folder, chat_tokenizer, tmp_path):
    """The network's folder with a tokenizer beside it."""
    for file in gemma_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"max_denoising_steps": 2, "max_new_tokens": 20}')
    chat_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_command_line_takes_the_familys_sampler_and_the_checkpoints_settings(checkpoint, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "hi", "--output", str(output)]
    assert main([*words, "--t_min", "0.3", "--entropy-bound", "0.2", "--device", "cpu"]) == 0
    record = json.loads(output.read_text())
    assert record["sampler"] == {
        "steps": 2, "max_new_tokens": 20, "block_size": 16, "eos": "allow", "entropy_bound": 0.2, "t_min": 0.3,
        "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005, "cache": "block", "revise": "redraw",
        "approximations": [],
    }  # fmt: skip
    assert 1 <= record["nfe"] <= 4 and len(record["token_ids"]) <= 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "0.5"], "temperature: DiffusionGemma's sampler has no such setting"),
        (["--cfg-scale", "1"], "cfg_scale: DiffusionGemma's sampler has no such setting"),
        (["--block_size", "32"], "block_size: 32 is not the model's canvas_length of 16"),
        (["--eos", "defer"], "eos: "),
        (["--t_max", "0.1"], "t_min: 0.4 is above t_max 0.1"),
        (["--max_new_tokens", "200"], "over the model's max_sequence_length 128"),
    ],
)
def test_what_the_command_line_refuses_is_one_line_and_status_2(checkpoint, capsys, words, says):
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "hi", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("positions", [1, 3])
def test_a_canvas_predicted_in_parts_is_the_same(gemma_model, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Its weights too, of which the next step's self-conditioning is made."""
    prompts, sampler = [[5, 6, 7], [8, 9]], SamplerConfig(max_new_tokens=32, steps=6)
    whole = generate(gemma_model, prompts, sampler=sampler)
    monkeypatch.setattr("unmask.ops.chunks.CACHED_LOGITS", 300 * positions)
    parts = generate(gemma_model, prompts, sampler=sampler)
    assert [(a.token_ids, a.stats.nfe) for a in parts] == [(a.token_ids, a.stats.nfe) for a in whole]
