"""The literal command `lm_eval --model unmask`: the finder that Python's start installs, and the command itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from unmask.errors import ConfigError
from unmask.evaluation.lm_eval import UnmaskLM

FILE = Path(__file__).parents[2] / "_unmask_lm_eval.py"
INSTALLED = Path(sysconfig.get_path("purelib"))
# As at Python's start, but from this file and without an installation's finder.
START = f"""
import importlib.util, sys
sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != "UnmaskModelFinder"]
spec = importlib.util.spec_from_file_location("_unmask_lm_eval", {str(FILE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.install()
module.install()
assert "lm_eval" not in sys.modules and "__future__" not in sys.modules
"""
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
# The console script twice in a fresh interpreter: once as it should be, then with a mistake. Reading the harness's own
# tasks, some 14,000 files, is all that is left out.
COMMAND = """
import functools, runpy, sys
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
import lm_eval.evaluator
lm_eval.evaluator.add_env_info = lambda results: None  # asks pip for all packages
script, good, bad, *words = sys.argv[1:]
for arguments in (good, bad):
    sys.argv = [script, "--model", "unmask", "--model_args", arguments, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        assert not left.code
"""


spec = importlib.util.spec_from_file_location("the_checkouts_unmask_lm_eval", FILE)
assert spec is not None and spec.loader is not None
finder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finder)


def python(code: str, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ if path is None else os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_python_installs_the_finder_when_it_reads_the_pth_file(tmp_path: Path) -> None:
    for file in (FILE, FILE.with_name("unmask_lm_eval.pth")):
        shutil.copy(file, tmp_path)
    done = python(f"""
import site, sys
sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != "UnmaskModelFinder"]
site.addsitedir({str(tmp_path)!r})
print(type(sys.meta_path[0]).__name__, "lm_eval" in sys.modules)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "UnmaskModelFinder False\n", "")


def test_the_harness_knows_the_model_by_name_and_loads_nothing_of_ours() -> None:
    code = f"""{START}
from lm_eval.api.registry import model_registry
import lm_eval.models
assert [type(each).__name__ for each in sys.meta_path].count("UnmaskModelFinder") == 1
assert dict(model_registry.items())["unmask"] == module.MODEL and "hf" in model_registry
print(*(name for name in sys.modules if name.split(".")[0] in ("unmask", "torch")))
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_registering_by_hand_keeps_the_harness_own_models() -> None:
    done = python("""
from unmask.evaluation.harness import register_model
register_model()
from lm_eval.api.registry import model_registry
assert {"unmask", "hf"} <= set(model_registry)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_name_stands_for_the_model_class() -> None:
    from lm_eval.api.registry import get_model, model_registry

    finder.register()
    finder.register()
    assert "unmask" in model_registry and get_model("unmask") is UnmaskLM


def test_a_harness_without_that_table_is_imported_all_the_same(tmp_path: Path) -> None:
    models = tmp_path / "lm_eval" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    (models / "__init__.py").write_text("known = 3\n")
    done = python(f"{START}\nimport lm_eval.models\nprint(lm_eval.models.known)", path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
    (models / "__init__.py").write_text("import no_such_module\n")
    done = python(f"{START}\nimport lm_eval.models", path=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("No module named 'no_such_module'\n")


@pytest.mark.parametrize("name", ["json", "lm_eval", "lm_eval.models.huggingface", "unmask", "models", "lm_eval.model"])
def test_every_other_import_is_left_alone(name: str) -> None:
    assert finder.UnmaskModelFinder().find_spec(name) is None


@pytest.mark.parametrize("others", [[], [object()], [SimpleNamespace(find_spec=lambda *_: SimpleNamespace())]])
def test_a_failure_inside_is_swallowed(others: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", others)
    assert finder.UnmaskModelFinder().find_spec("lm_eval.models") is None


def test_under_the_harness_command_a_mistake_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("atexit.register", lambda function: None)
    theirs = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: theirs.append(error))
    hook = sys.excepthook
    monkeypatch.delitem(sys.modules, "lm_eval._cli", raising=False)
    with pytest.raises(ConfigError, match="--model_args: pretrained is missing"):
        UnmaskLM.create_from_arg_obj({})
    assert sys.excepthook is hook
    monkeypatch.setitem(sys.modules, "lm_eval._cli", SimpleNamespace())
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            UnmaskLM.create_from_arg_string("stepz=3,pretrained=x")
    with pytest.raises(SystemExit) as left:
        sys.excepthook(ConfigError, raised.value, None)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("unmask: error: --model_args: 'stepz' is not one of") and said.count("\n") == 1
    mistake = ValueError("another's")
    sys.excepthook(ValueError, mistake, None)
    assert theirs == [(ValueError, mistake, None)]


@pytest.mark.slow
@pytest.mark.skipif(
    not (INSTALLED / "unmask_lm_eval.pth").exists() and not os.environ.get("CI"),
    reason="unmask_lm_eval.pth is not installed in this environment, as by: pip install -e '.[dev]'",
)
def test_lm_eval_itself_runs_the_model(tiny_base: Path, tmp_path: Path) -> None:
    assert (INSTALLED / FILE.name).read_bytes() == FILE.read_bytes(), "installed from another version; install again"
    rows = [{"question": f"{n} plus {n}?", "answer": f"it is {2 * n}"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy_write.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    arguments = "preset=reference,max_new_tokens=8,steps=8,block_size=8"
    words = ["--tasks", "toy_write", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    script = Path(sysconfig.get_path("scripts")) / "lm_eval"
    both = (f"pretrained={folder},{arguments}" for folder in (tiny_base, tmp_path / "nowhere"))
    done = python(COMMAND, str(script), *both, *words)
    assert "toy_write" in done.stdout and len(list((tmp_path / "out").rglob("results_*.json"))) == 1
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("unmask: error: --model_args: pretrained: no such")
