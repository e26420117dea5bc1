"""lm-evaluation-harness as a caller sees it: whether it is installed, its tasks, a run of them. Imported late."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import ConfigError, MissingDependencyError, choice_problem, nearest
from unmask.evaluation.tasks import HARNESS, TASKS, near_miss


def check_names(names: Sequence[str], include_path: str | None) -> None:
    """Refuse names that are not ours without the list of the harness's tasks, which takes long to read.

    Raises:
        MissingDependencyError: no harness.
        ConfigError: a misspelling of one of our tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            f"--tasks: {choice_problem(names[0].removeprefix(HARNESS), TASKS)}; lm-evaluation-harness has more: "
            "pip install 'unmask[eval]'"
        )
    for name in names:
        own = near_miss(name)
        if own is not None and include_path is None:
            raise ConfigError(
                f"--tasks: {name!r} is not one of {', '.join(TASKS)} (did you mean {own!r}?); "
                f"a task of lm-evaluation-harness of that name is {HARNESS}{name}"
            )


def register_model() -> None:
    """Put the model `unmask` into the harness's table; its class, and with it torch, loads when it is asked for."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "the model `unmask` of lm_eval needs lm-evaluation-harness, which is not installed; run: "
            "pip install 'unmask[eval]'"
        )
    import lm_eval.models  # noqa: F401 - the harness imports its own models only where the table is still empty
    from lm_eval.api.registry import model_registry

    if "unmask" not in model_registry:
        model_registry.register("unmask", target="unmask.evaluation.lm_eval:UnmaskLM")


def task_manager(names: Sequence[str], include_path: str | None = None) -> Any:
    """Return the harness's task manager for some tasks, groups or tags, with or without the prefix.

    Raises:
        ConfigError: a task that neither the harness nor we have, with the nearest name.
    """
    from lm_eval.tasks import TaskManager

    names = [name.removeprefix(HARNESS) for name in names]
    manager = None
    if include_path is not None:
        # The harness reads some 14,000 files of its own otherwise.
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name, [*TASKS, *manager.all_tasks])
            raise ConfigError(
                f"--tasks: {name!r} is neither one of {', '.join(TASKS)} nor a task of lm-evaluation-harness{hint}"
            )
    return manager


def run_harness(
    lm: Any,
    manager: Any,
    names: Sequence[str],
    *,
    limit: int | None,
    few_shot: int | None,
    chat: bool,
    seed: int,
    cache: str | None,
) -> dict[str, Any]:
    """Run tasks of the harness on an `UnmaskLM`, with the manager from `task_manager`.

    `cache` is the path of its cache of answers, from which an interrupted evaluation goes on.

    Returns:
        `results`: task or group → metrics; `samples`: task → what was asked and answered; both empty on other ranks.
    """
    from lm_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model=lm,
        tasks=[name.removeprefix(HARNESS) for name in names],
        num_fewshot=few_shot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        use_cache=cache,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {key: {} if found is None else found.get(key, {}) for key in ("results", "samples")}


def metrics(result: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Return (metric, value, standard error or None) of one task's result."""
    rows = []
    for key, value in result.items():
        metric, _, variant = key.partition(",")
        if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not variant:
            continue
        error = result.get(f"{metric}_stderr,{variant}")
        shown = metric if variant == "none" else f"{metric} ({variant})"
        rows.append((shown, float(value), float(error) if isinstance(error, (int, float)) else None))
    return rows


def unscored(samples: Sequence[Mapping[str, Any]]) -> int:
    """Return how many requests of a task could not be scored, given its samples."""
    responses = {
        (sample["doc_id"], number): response
        for sample in samples
        for number, answers in enumerate(sample["resps"])
        for response in answers
    }
    return sum(isinstance(each, (tuple, list)) and each[0] == -math.inf for each in responses.values())
