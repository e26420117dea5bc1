"""Where training rows come from, how they become tokens (`dataset`), and how they are batched (`dataloader`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from unmask.errors import FieldError, choice_problem

OnMalformed = Literal["error", "skip"]
Answers = Literal["all", "last", "one"]

# Padding that changes no number is rounded up to a multiple of this: a matmul library keeps memory for every shape that
# it has met (oneDNN's primitive cache), and rows of text have hundreds of lengths.
LENGTH_MULTIPLE = 16

# Variables that rendering a conversation sets itself.
_RENDERING = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class DatasetConfig:
    """Sections `dataset` and `validation_dataset`: rows and how they become tokens.

    A path, or a name in a folder that exists here, is never sent to the hub.

    Attributes:
        path_or_dataset_id: a .jsonl, .json, .parquet or .arrow file, a folder of them, laid out as on the hub, a folder
            that `datasets` saved, or a hub id `owner/name`
        name: configuration of a hub dataset, or of a folder whose README.md lists some
        split: which split of a hub dataset, a saved folder, or a folder of files
        shuffle_seed: seed of the row order; null takes the run's `seed`
        seq_length: longest row, in tokens; at least 2 and at most the model's `max_sequence_length`
        truncation: cut rows that are longer; false drops and counts them
        unshifted: must be true: a diffusion model predicts the token at its own position
        answers: which answers of a conversation train: `all`; `last`; or `one`, drawn anew for each row and epoch, with
            which the text then ends. null is `one` where attention is bidirectional, so that no answer is trained with
            later turns in sight, and `all` elsewhere
        mask_history: NeMo AutoModel's word for it: true is `answers: last`, false `answers: all`
        tokenizer: folder or hub id of the tokenizer; null takes the model's; a fresh network needs one
        chat_template: name of one that comes with the package (`llada`, `diffusion_gemma`) or path of a .jinja file;
            null takes the tokenizer's
        chat_template_kwargs: values of the template's own variables, such as `enable_thinking: true`; true or false,
            numbers, text or null
        supervise_reasoning: supervise the assistant's reasoning where the template renders it, as part of the answer
        prompt_column: with `completion_column`, the columns of one-turn rows; null for chat rows
        completion_column: see `prompt_column`
        ignore_keys: keys of rows, turns and parts of a text that are left out, though they change what a row teaches
        max_samples: use the first rows only; null for all
        on_malformed: `error` stops at a malformed row, `skip` leaves it out and counts it
    """

    path_or_dataset_id: str
    name: str | None = None
    split: str | None = None
    shuffle_seed: int | None = None
    seq_length: int = 1024
    truncation: bool = True
    unshifted: bool = True
    answers: Answers | None = None
    mask_history: bool | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    supervise_reasoning: bool = False
    prompt_column: str | None = None
    completion_column: str | None = None
    ignore_keys: list[str] | None = None
    max_samples: int | None = None
    on_malformed: OnMalformed = "error"

    def __post_init__(self) -> None:
        for field in ("path_or_dataset_id", "name", "split", "tokenizer", "chat_template"):
            if getattr(self, field) is not None and not getattr(self, field).strip():
                raise FieldError(field, "is empty")
        for name, value in (self.chat_template_kwargs or {}).items():
            _check_variable(name, value)
        if not self.unshifted:
            raise FieldError("unshifted", "a diffusion model predicts the token at its own position; set it to true")
        if self.seq_length < 2:
            raise FieldError("seq_length", f"must be at least 2 tokens, got {self.seq_length}")
        if self.max_samples is not None and self.max_samples < 1:
            raise FieldError("max_samples", f"must be at least 1, or null for all rows, got {self.max_samples}")
        self._take_mask_history()
        if (self.prompt_column is None) != (self.completion_column is None):
            given, other = ("prompt_column", "completion_column")[:: 1 if self.prompt_column is not None else -1]
            raise FieldError(other, f"must be set too, since {given} is; or delete both")
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise FieldError("completion_column", f"is the prompt column, {self.prompt_column!r}, too")
        for key in self.ignore_keys or ():
            if not key.strip():
                raise FieldError("ignore_keys", "has an empty name; remove it")
            if key in (self.prompt_column, self.completion_column):
                raise FieldError("ignore_keys", f"has {key!r}, the column of the rows' text; remove it")
        if self.on_malformed not in get_args(OnMalformed):
            raise FieldError("on_malformed", choice_problem(self.on_malformed, get_args(OnMalformed)))

    def _take_mask_history(self) -> None:
        if self.mask_history is None:
            return
        meant = "last" if self.mask_history else "all"
        if self.answers not in (None, meant):
            said = str(self.mask_history).lower()
            raise FieldError(
                "answers", f"{self.answers!r} contradicts mask_history: {said}, which is {meant}; remove one"
            )
        object.__setattr__(self, "answers", meant)


def resolve_answers(section: DatasetConfig, attention: str) -> DatasetConfig:
    """Return the section with `answers` chosen, for a model of that attention (`unmask.models.family.Attention`)."""
    if section.answers is not None:
        return section
    return replace(section, answers="one" if attention == "bidirectional" else "all")


def _check_variable(name: object, value: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise FieldError("chat_template_kwargs", f"{name!r} is no name of a template's variable")
    field = f"chat_template_kwargs.{name}"
    if name == "supervise_reasoning":
        raise FieldError(field, "has a field of its own; set dataset.supervise_reasoning")
    if name in _RENDERING or name.endswith("_token"):
        raise FieldError(field, "is set by what renders a conversation; remove it")
    if not (value is None or isinstance(value, (bool, int, float, str))):
        raise FieldError(field, f"must be true or false, a number, text or null, got {value!r}")


@dataclass(frozen=True)
class DataloaderConfig:
    """Section `dataloader`: the order of rows, and encoding ahead.

    Attributes:
        shuffle: visit the rows in a new random order each epoch; false takes them as they lie in the source, after
            those that the epoch before left over
        group_by_length: batch rows of like length, for less padding; the batches still come in random order
        num_workers: processes that encode rows ahead, on each rank; 0 encodes in the training process, which remembers
            up to 64 MiB of rows for later epochs, if they are the same in each; the result is the same; more than the
            rank's share of the cores are not started, which the run says
    """

    shuffle: bool = True
    group_by_length: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise FieldError("num_workers", f"must be 0 or more, got {self.num_workers}")


def rounded_up(length: int) -> int:
    """Return the length up to which rows of at most `length` positions are padded."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
