"""`python -m unmask.lm_eval`: the harness's own command line, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.evaluation.lm_eval import UnmaskLM

ROOT = Path(__file__).parents[2]
TASK = """task: toy_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
# The module twice in a fresh interpreter: once as it should be, then with a mistake. Reading the harness's own tasks,
# some 14,000 files, is all that is left out.
COMMAND = """
import functools, runpy, sys
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
import lm_eval.evaluator
lm_eval.evaluator.add_env_info = lambda results: None  # asks pip for all packages
good, bad, *words = sys.argv[1:]
for arguments, status in ((good, 0), (bad, 2)):
    sys.argv = ["lm_eval", "--model", "unmask", "--model_args", arguments, *words]
    try:
        runpy.run_module("unmask.lm_eval", run_name="__main__")
    except SystemExit as left:
        assert left.code == status, left.code
"""


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_registering_keeps_the_harness_own_models_and_loads_nothing_of_ours() -> None:
    done = python("""
import sys
from unmask.evaluation.harness import register_model
register_model()
register_model()
from lm_eval.api.registry import model_registry
assert {"unmask", "hf"} <= set(model_registry)
print("torch" in sys.modules or "unmask.evaluation.lm_eval" in sys.modules)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_the_name_stands_for_the_model_class() -> None:
    from lm_eval.api.registry import get_model

    from unmask.evaluation.harness import register_model

    register_model()
    assert get_model("unmask") is UnmaskLM


@pytest.mark.slow
def test_the_module_runs_the_harness_and_ends_a_mistake_in_one_line(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{n} plus {n}?", "answer": f"it is {2 * n}"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy_write.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    arguments = "preset=reference,max_new_tokens=8,steps=8,block_size=8"
    words = ["--tasks", "toy_write", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    both = (f"pretrained={folder},{arguments}" for folder in (tiny_base, tmp_path / "nowhere"))
    done = python(COMMAND, *both, *words)
    assert "toy_write" in done.stdout and len(list((tmp_path / "out").rglob("results_*.json"))) == 1
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("unmask: error: --model_args: pretrained: no such")
