"""`unmask train`: fine-tune a model as a YAML file says."""

from __future__ import annotations

import argparse
from typing import Any

from unmask.config import load_config
from unmask.config.flags import command, flag
from unmask.distributed.processes import process_rank, world_size
from unmask.errors import ConfigError
from unmask.places import user_path

_TRAIN_HELP = """\
Any field of the configuration can be set after the file:  --optimizer.lr 1e-4  --step_scheduler.max_steps=200
The same command resumes a run from its newest checkpoint, exactly. Ctrl-C and SIGTERM save a checkpoint and stop.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "train", run, "fine-tune a model described by a YAML file", _TRAIN_HELP)
    parser.add_argument("-c", "--config", required=True, metavar="CONFIG.yaml", help="configuration of the run")
    flag(
        parser,
        "dry_run",
        action="store_true",
        help="check the rows, show configuration, sizes, memory and three rows, then stop",
    )
    flag(parser, "nproc_per_node", type=int, metavar="N", help="processes to start on this machine")
    flag(parser, "profile", type=int, metavar="N", help="write a torch profiler trace of N steps, and where time went")
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command; return its exit status."""
    processes = arguments.nproc_per_node or 1
    for name, number in (("nproc-per-node", arguments.nproc_per_node), ("profile", arguments.profile)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name}: must be at least 1, got {number}")
    if arguments.profile and arguments.dry_run:
        raise ConfigError("--profile: a dry run makes no steps; leave out one of the two")
    if processes > 1 and world_size() > 1:
        raise ConfigError("--nproc-per-node: torchrun started this process already; give the number to torchrun alone")
    loaded = load_config(arguments.config, arguments.overrides)
    from unmask.prepare import prepare
    from unmask.training.run_directory import hold_run_dir, refuse_model_folder

    prepared = prepare(loaded, weights=not arguments.dry_run, processes=processes if processes > 1 else None)
    root = user_path(prepared.config.checkpoint.checkpoint_dir, "checkpoint.checkpoint_dir")
    refuse_model_folder(root)
    if processes > 1 and not arguments.dry_run:
        from unmask.distributed.launch import launch

        profile = ["--profile", str(arguments.profile)] if arguments.profile else []
        return launch("unmask.train", ["-c", arguments.config, *profile, *arguments.overrides], processes)
    if arguments.dry_run and process_rank() > 0:
        return 0
    from rich.console import Console

    if arguments.dry_run:
        from unmask.preview import show_plan

        show_plan(prepared, Console())
        return 0
    if world_size() == 1:
        with hold_run_dir(root, prepared.config.checkpoint):
            pass  # a place that cannot be trained in is refused before torch loads
    from unmask.assemble import run_training

    outcome = run_training(prepared, Console(), own_process=True, profile=arguments.profile or 0)
    if process_rank() > 0:
        return 0
    print(f"{outcome.reason} after step {outcome.step}; run directory: {root}")
    if outcome.best is not None:
        print(f"best {outcome.best.metric}: {outcome.best.value:.4f} after step {outcome.best.step}, {root / 'best'}")
    if outcome.reason.startswith("SIG"):
        print("the same command resumes this run where it stopped")
    return 0
