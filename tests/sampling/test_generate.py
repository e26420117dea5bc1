from __future__ import annotations

import pytest
import torch

from unmask.config.sampler import SamplerConfig
from unmask.errors import SamplingError
from unmask.sampling.generate import generate

SHORT = SamplerConfig(steps=4, max_new_tokens=8, block_size=4)
HOT = SamplerConfig(steps=8, max_new_tokens=16, block_size=8, temperature=1.0)


def tokens(answers) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_a_list_in_a_list_out_in_the_callers_order(small_model):
    model = small_model()
    prompts = [[1] * 20, [2], [3] * 7]
    together = generate(model, prompts, sampler=SHORT, batch_size=2)
    assert [answer.prompt_ids for answer in together] == prompts
    assert tokens(together) == [generate(model, prompt, sampler=SHORT)[0].token_ids for prompt in prompts]
    assert generate(model, [], sampler=SHORT) == []


def test_the_same_seed_is_the_same_answer_and_another_seed_another(small_model):
    model, prompts = small_model(), [[1, 2], [3]]
    first = tokens(generate(model, prompts, sampler=HOT, seed=1))
    assert first == tokens(generate(model, prompts, sampler=HOT, seed=1))
    assert first != tokens(generate(model, prompts, sampler=HOT, seed=2))
    assert tokens(generate(model, prompts, sampler=HOT)) == tokens(generate(model, prompts, sampler=HOT, seed=42))


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_draws_do_not_depend_on_neighbours_order_or_batch_size(small_model, remasking):
    model, prompts = small_model(), [[1, 2, 3], [4], [5, 6], [7] * 11]
    sampler = SamplerConfig(steps=8, max_new_tokens=16, block_size=8, temperature=0.7, remasking=remasking)
    alone = [generate(model, prompt, sampler=sampler)[0].token_ids for prompt in prompts]
    for size in (1, 3, None):
        assert tokens(generate(model, prompts, sampler=sampler, batch_size=size)) == alone
    assert tokens(generate(model, prompts[::-1], sampler=sampler)) == alone[::-1]


def test_the_same_prompt_twice_is_answered_twice(small_model):
    one, two = tokens(generate(small_model(), [[1, 2], [1, 2]], sampler=HOT))
    assert one != two
    assert tokens(generate(small_model(), [1, 2], sampler=HOT)) == [one]


def test_the_global_generator_is_neither_read_nor_moved(small_model):
    model = small_model()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = tokens(generate(model, [1], sampler=HOT))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert tokens(generate(model, [1], sampler=HOT)) == first


def test_random_remasking_settles_other_positions_and_follows_the_seed(small_model):
    def order(seed: int, remasking) -> list[list[bool]]:
        seen = []
        sampler = SamplerConfig(steps=8, max_new_tokens=8, block_size=8, remasking=remasking, eos="suppress")
        generate(
            small_model(), [1], sampler=sampler, seed=seed, on_event=lambda e: seen.append(e.committed_BC[0].tolist())
        )
        assert len(seen) == 8
        return seen

    assert order(1, "random") == order(1, "random")
    assert order(1, "random") != order(2, "random")
    assert order(1, "low_confidence") == order(2, "low_confidence")


def test_a_mask_token_in_the_prompt_stays_given(small_model):
    model, fed = small_model(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].clone()))
    answer = generate(model, [39, 5, 39], sampler=SamplerConfig(steps=4, max_new_tokens=4))[0]
    handle.remove()
    assert len(fed) == 4 and all(ids[0, :3].tolist() == [39, 5, 39] for ids in fed)
    assert answer.prompt_ids == [39, 5, 39] and 39 not in answer.token_ids


def test_padding_is_on_the_right_and_each_row_counts_from_its_own_start(small_model):
    model, fed = small_model(), []
    handle = model.register_forward_pre_hook(lambda module, args: fed.append(args))
    generate(model, [[1, 2, 3], [4]], sampler=SamplerConfig(steps=1, max_new_tokens=2, eos="suppress"))
    handle.remove()
    [(ids, attend)] = fed
    assert ids.tolist() == [[4, 39, 39, 0, 0], [1, 2, 3, 39, 39]]
    assert attend.tolist() == [[True, True, True, False, False], [True] * 5]


def test_prompts_of_like_length_share_a_batch(small_model):
    model, shapes = small_model(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    sampler = SamplerConfig(steps=1, max_new_tokens=2, eos="suppress")
    generate(model, [[1] * 9, [2], [3] * 9, [4]], sampler=sampler, batch_size=2)
    handle.remove()
    assert shapes == [(2, 3), (2, 11)]


def test_guidance_masks_the_whole_prompt_and_counts_a_pair_once(small_model):
    model, fed = small_model(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].clone()))
    sampler = SamplerConfig(steps=2, max_new_tokens=4, cfg_scale=0.5, eos="suppress")
    answer = generate(model, [1, 2], sampler=sampler)[0]
    handle.remove()
    assert answer.stats.nfe == len(fed) == 2
    assert fed[0].tolist() == [[1, 2, 39, 39, 39, 39], [39, 39, 39, 39, 39, 39]]


def test_guidance_in_an_unequal_batch_equals_each_row_alone(reference_model, reference):
    prompts = [reference["generate.prompt"][0].tolist(), [5, 6, 7]]
    sampler = SamplerConfig(steps=8, max_new_tokens=16, block_size=8, cfg_scale=1.0)
    alone = [generate(reference_model, prompt, sampler=sampler)[0].token_ids for prompt in prompts]
    assert tokens(generate(reference_model, prompts, sampler=sampler)) == alone


def test_answers_end_before_the_first_eos(small_model):
    answer = generate(small_model(favour={38: 50.0}), [1], sampler=SHORT)[0]
    assert (answer.token_ids, answer.finish_reason, answer.stats.nfe) == ([], "eos", 1)
    assert answer.stats.tokens_per_forward == 0
    kept = generate(small_model(favour={38: 50.0}), [1], sampler=SamplerConfig(4, 8, 4, eos="suppress"))[0]
    assert len(kept.token_ids) == 8 and kept.finish_reason == "length" and 38 not in kept.token_ids


def test_padding_that_is_the_eos_may_be_written_and_other_padding_not(small_model):
    assert generate(small_model({37: 50.0}, eos_token_id=37), [1], sampler=SHORT)[0].finish_reason == "eos"
    assert 37 not in generate(small_model({37: 50.0}), [1], sampler=SHORT)[0].token_ids


def test_text_stops_and_decoding_come_from_the_tokenizer(text_model, chat_tokenizer):
    answer = generate(text_model, "hi", tokenizer=chat_tokenizer, sampler=SHORT)[0]
    assert answer.text == chat_tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert generate(text_model, answer.prompt_ids, sampler=SHORT)[0].text is None
    with torch.no_grad():
        text_model.transformer.ff_out.bias[258] = 50.0  # the end of turn
    ended = generate(text_model, "hi", tokenizer=chat_tokenizer, sampler=SHORT)[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([], "", "eos")
    assert generate(text_model, "hi", tokenizer=chat_tokenizer, raw=True, sampler=SHORT)[0].prompt_ids == [71, 72]


def test_statistics_add_up(small_model):
    stats = generate(small_model(), [1], sampler=SamplerConfig(4, 8, 4, eos="suppress"))[0].stats
    assert stats.nfe == 4 and stats.tokens_per_forward == 2
    assert stats.seconds > 0 and stats.tokens_per_second == pytest.approx(8 / stats.seconds)


def test_the_head_computes_open_positions_of_the_block_only(small_model, monkeypatch):
    model, scored = small_model(), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: scored.append(hidden.shape[0]) or logits(hidden))
    generate(model, [[1], [2, 3]], sampler=SamplerConfig(8, 8, 4, eos="suppress"))
    assert scored == [8, 6, 4, 2, 8, 6, 4, 2]


def test_eval_mode_is_for_the_call_only(small_model):
    model = small_model().train()
    model.transformer.ln_f.eval()
    modes, seen = [module.training for module in model.modules()], []
    generate(model, [1], sampler=SHORT, on_event=lambda event: seen.append(model.training))
    assert not any(seen) and [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="stop"):
        generate(model, [1], sampler=SHORT, on_event=lambda event: (_ for _ in ()).throw(RuntimeError("stop")))
    assert [module.training for module in model.modules()] == modes


def test_bf16_networks_sample(small_model):
    answer = generate(small_model().bfloat16(), [[1], [2, 3]], sampler=HOT)
    assert all(set(row.token_ids) <= set(range(40)) - {37, 38, 39} for row in answer)


def test_confidences_of_a_bf16_network_are_untempered_and_in_fp32(small_model):
    model, hidden = small_model().bfloat16(), []
    logits = model.logits
    model.logits = lambda states: hidden.append(logits(states)) or hidden[-1].clone()
    events = []
    sampler = SamplerConfig(steps=2, max_new_tokens=8, eos="suppress", temperature=0.8)
    generate(model, [1], sampler=sampler, on_event=events.append)
    for event, raw in zip(events, hidden, strict=True):
        allowed = raw.double().index_fill(1, torch.tensor([37, 38, 39, *range(40, 48)]), -torch.inf)
        weighed = event.score_BC[0].isfinite()
        tokens = event.answer_BC[0, event.committed_BC[0]]
        exact = allowed[event.committed_BC[0][weighed]].softmax(-1).gather(1, tokens[:, None])[:, 0]
        found = event.confidence_BC[0, event.committed_BC[0]]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_settings_of_a_long_vocabulary_are_weighed_in_pieces(small_model, monkeypatch):
    whole = tokens(generate(small_model(), [[1], [2, 3]], sampler=HOT))
    monkeypatch.setattr("unmask.sampling.engine.loop._LOGITS_AT_ONCE", 48 * 3)
    assert tokens(generate(small_model(), [[1], [2, 3]], sampler=HOT)) == whole


def test_messages_call_a_prompt_what_the_caller_does(small_model):
    def ask(*prompts: list[int]) -> None:
        generate(model, list(prompts), sampler=SamplerConfig(steps=2, max_new_tokens=4), labels=["f:3", "f:8"])

    model = small_model(favour={5: torch.nan})
    with pytest.raises(SamplingError, match=r"^f:8: token id 900 is outside"):
        ask([1], [900])
    with pytest.raises(SamplingError, match=r"^f:8: the list is empty"):
        ask([1], [])
    with pytest.raises(SamplingError, match=r"not finite at f:3 \(block 1, step 1\), f:8 \(block 1, step 1\)"):
        ask([1], [2])
    with pytest.raises(SamplingError, match="labels: 2 for 1 prompts"):
        ask([1])


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[1] * 125], {}, "prompt 0: 125 tokens and max_new_tokens=8 make 133, over .* max_sequence_length 128"),
        ([[1], [48]], {}, "prompt 1: token id 48 is outside the model's vocabulary of 48"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"batch_size": 0}, "batch_size: must be an integer of at least 1, got 0"),
        ("hi", {}, "needs a tokenizer"),
    ],
)
def test_bad_calls_are_refused(small_model, prompts, options, says):
    with pytest.raises(SamplingError, match=says):
        generate(small_model(), prompts, sampler=SHORT, **options)


def test_a_network_of_no_known_family_is_refused():
    with pytest.raises(SamplingError, match="cannot sample from a Linear"):
        generate(torch.nn.Linear(2, 2), [1])


def test_the_longest_prompt_that_fits_is_taken(small_model):
    assert generate(small_model(), [[1] * 120, [2]], sampler=SHORT)[0].stats.nfe >= 1
