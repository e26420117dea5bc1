"""Exact match while training: answers to held-out rows, sampled as `unmask generate` would, and judged.

The draws have seeds of their own and torch's global generator is not touched, so that a run learns the same with it and
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.config.results import ValidationConfig
from unmask.errors import ConfigError
from unmask.models.registry import family_of
from unmask.rng import key
from unmask.sampling.settings import resolve_settings

if TYPE_CHECKING:
    from torch import nn

    from unmask.distributed.runtime import Runtime
    from unmask.evaluation.tasks import Question

SAMPLES = "samples.jsonl"


def check_lengths(
    questions: Sequence[Question], section: ValidationConfig, tokenizer: Any, model_config: Any,
    generation: Mapping[str, Any],
) -> None:  # fmt: skip
    """Refuse a question that does not fit the model with its answer: now, and not after hours of training.

    Raises:
        ConfigError: naming the row.
    """
    from unmask.sampling.prompts import encode_prompts

    room = (
        model_config.max_sequence_length
        - resolve_settings(section.settings(), family_of(model_config), model_config, generation).length
    )
    mask = getattr(model_config, "mask_token_id", None)
    encoded = encode_prompts([question.as_prompt() for question in questions], tokenizer, mask_id=mask)
    for question, ids in zip(questions, encoded, strict=True):
        if len(ids) > room:
            raise ConfigError(
                f"validation.sampler: {question.label} asks in {len(ids)} tokens, and with the answer's length only "
                f"{room} fit the model's max_sequence_length {model_config.max_sequence_length}; lower max_new_tokens "
                "or take the row out"
            )


def answer_validator(
    questions: Sequence[Question],
    section: ValidationConfig,
    tokenizer: Any,
    runtime: Runtime,
    seed: int,
    root: Path,
) -> Callable[[nn.Module, int], dict[str, Any]]:
    """Return what measures exact match: it takes the network and the step and returns an event's fields.

    Args:
        questions: all of them; ranks divide them.
        section: how they are asked.
        tokenizer: with the chat template that training uses.
        runtime: device and ranks.
        seed: the run's.
        root: the run directory, for samples.jsonl.
    """
    from unmask.evaluation.samples import sample_answers, write_samples

    own_seed = key(seed, "validation/answers") % 2**63

    def measure(model: nn.Module, step: int) -> dict[str, Any]:
        """Return exact match over all ranks at a step, and keep answers."""
        from unmask.evaluation.exact_match import TaskRun, encode_questions

        with runtime.autocast(), _in_eval(model):
            together = nullcontext()
            if runtime.meshes is not None:
                from unmask.distributed.inference import JointCalls

                together = JointCalls(model, runtime.ranks)
            run = TaskRun(
                model,
                questions,
                encode_questions(model, questions, tokenizer),
                tokenizer,
                section.settings(),
                own_seed,
                section.batch_size,
                section.grader,
                ranks=runtime.ranks,
                together=together,
            )
            answers = run.answers()
            samples = sample_answers(run, range(min(section.keep_samples, len(questions))))
        if runtime.meshes is not None:
            from unmask.distributed.runtime import free_gathered

            free_gathered(model)
        if runtime.ranks.first:
            write_samples(root / SAMPLES, step, questions, samples)
        right = sum(answer.grade.correct for answer in answers)
        return {"exact_match": right / len(answers), "right": right, "total": len(answers)}

    return measure


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
