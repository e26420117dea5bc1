"""The documents against the code: fields and defaults, links and files, command lines, YAML and Python examples."""

from __future__ import annotations

import copy
import dataclasses
import re
import runpy
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from unmask.cli import build_parser
from unmask.config import RunConfig, config_from_mapping, parse_overrides
from unmask.config.sampler import SamplerConfig

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CONFIGURATION = ROOT / "docs" / "configuration.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
_SHELL = ("bash", "sh", "shell", "console", "")


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def options(hint: object) -> tuple:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def sections() -> dict[str, type]:
    """Section name → its dataclass; scalar fields of the top level are left out."""
    hints = typing.get_type_hints(RunConfig).items()
    return {name: option for name, hint in hints for option in options(hint) if dataclasses.is_dataclass(option)}


def documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Heading → field → (type, default, meaning) of its table; "" for what stands before the first section."""
    parts = re.split(r"^## `(\w+)`$", CONFIGURATION.read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    return {name: {row[0]: row[1:] for row in _ROW.findall(text)} for name, text in tables.items()}


def assert_described(field: dataclasses.Field, hint: object, row: tuple[str, str, str]) -> None:
    kind, default, _ = row
    if field.default is dataclasses.MISSING:
        assert default == "required", field.name
    else:
        shown = yaml.safe_load(default.strip("`"))
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        assert (float(shown) if isinstance(value, float) else shown) == value, field.name
    for option in options(hint):
        if typing.get_origin(option) is typing.Literal:
            assert re.findall(r"`(\w+)`", kind) == list(typing.get_args(option)), field.name
    assert ("null" in kind) == (type(None) in options(hint)), field.name


def test_every_field_is_on_the_configuration_page_with_its_default() -> None:
    tables, known = documented(), sections()
    assert set(tables) == {"", *known}
    for name, section in known.items():
        rows = tables[name]
        if name == "validation_dataset":
            assert not rows  # it refers to dataset's table, whose class it shares
            assert section is known["dataset"]
            continue
        hints = typing.get_type_hints(section)
        assert list(rows) == [field.name for field in dataclasses.fields(section)], name
        for field in dataclasses.fields(section):
            assert_described(field, hints[field.name], rows[field.name])
    scalars = [field for field in dataclasses.fields(RunConfig) if field.name not in known]
    assert list(tables[""]) == [field.name for field in scalars]
    for field in scalars:
        assert_described(field, typing.get_type_hints(RunConfig)[field.name], tables[""][field.name])


def test_the_tables_of_the_configuration_page_are_the_sections_own() -> None:
    """`python docs/write_tables.py` makes them from types, defaults and docstrings."""
    page = CONFIGURATION.read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "write_tables.py"))["written"](page) == page


@pytest.mark.slow
def test_the_tables_of_memory_are_counted() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "write_memory.py"))["written"](page) == page


def test_the_tables_of_the_sampling_reference_are_the_families_own() -> None:
    page = (ROOT / "docs" / "sampling-reference.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "write_tables.py"))["sampling_written"](page) == page
    for name in (field.name for field in dataclasses.fields(SamplerConfig)):
        assert f"\n| `{name}` | " in page, name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@every_page
def test_files_named_in_the_text_exist(page: Path) -> None:
    for name in re.findall(r"`((?:unmask|examples|tests|docs|benchmarks|\.ci)/[\w./-]+)`", prose(page)):
        if page.name != "CONTRIBUTING.md" or "sedd" not in name:  # the family that it adds as an example
            assert (ROOT / name).exists(), name


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^\| \[([\w-]+\.md)\]\(\1\)", index.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page != index)


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `unmask` of every command line in a page's shell blocks, whatever starts it."""
    starts = [
        r"(?:\.venv/bin/)?unmask",
        r"(?:torchrun|python)[^#\n]*?-m unmask\.(train)",
        r"(?:torchrun|python)[^#\n]*?examples/dllm_sft/(?:finetune|prep_gsm8k)\.py",
        r"python examples/dllm_generate/generate\.py",
    ]
    implied = {"finetune.py": ["train"], "prep_gsm8k.py": ["prep", "gsm8k"], "generate.py": ["generate"]}
    for body in blocks(page, *_SHELL):
        body = re.sub(r"\\\n\s*", " ", body)
        for name, value in re.findall(r'^([A-Z]+)="([^"]*)"$', body, re.MULTILINE):
            body = body.replace(f"${name}", value)
        for line in body.splitlines():
            line = line.strip().removeprefix("$ ")
            found = next((match for start in starts if (match := re.match(rf"{start}(?=\s|$)", line))), None)
            if found is not None:
                script = found.group().rsplit("/", 1)[-1]
                before = ["train"] if "-m unmask.train" in found.group() else implied.get(script, [])
                yield [*before, *shlex.split(line[found.end() :], comments=True)]


def assert_runs(words: list[str]) -> None:
    """Assert that a command line has known flags and, for `train`, overrides of known fields."""
    if "--help" in words or "--version" in words:
        words = [word for word in words if word not in ("--help", "--version")]
        if len(words) < 2:
            return
    arguments, rest = build_parser().parse_known_args(words)
    if not getattr(arguments, "takes_overrides", False):
        assert rest == [], words
        return
    known = sections()
    for key, _ in parse_overrides(rest):
        section, _, name = key.partition(".")
        assert section in RunConfig.__dataclass_fields__, words
        assert not name or name.split(".")[0] in {field.name for field in dataclasses.fields(known[section])}, words


@every_page
def test_command_lines_are_understood(page: Path) -> None:
    for words in commands(page):
        assert_runs(words)


def test_command_lines_are_found_at_all() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert {words[0] for words in found} >= {"train", "generate", "prep", "plot", "export"}


@every_page
def test_flags_named_in_the_text_exist(page: Path) -> None:
    subparsers = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    choices = typing.cast(dict, subparsers.choices)
    for command, flags in re.findall(r"`unmask (\w+)((?: [^`]*)?)`", prose(page)):
        assert command in choices, command
        for flag in re.findall(r"(?<!\S)(--\w[\w-]*)(?=[\s=]|$)", flags):
            assert flag in choices[command]._option_string_actions, f"unmask {command} {flag}"


BASE = {
    "model": {"pretrained_model_name_or_path": "folder"},
    "dataset": {"path_or_dataset_id": "rows.jsonl"},
    "step_scheduler": {"max_steps": 1},
}


@every_page
def test_yaml_examples_are_configurations(page: Path) -> None:
    for body in blocks(page, "yaml"):
        values = {**copy.deepcopy(BASE), **yaml.safe_load(body)}
        assert config_from_mapping(values).config, body


# PEFT asks transformers 5 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_python_examples_run(tiny, train_tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.cli import main

    monkeypatch.chdir(tmp_path)
    train_tiny(tiny.config(tmp_path / "RUN"))
    assert main(["export", "--checkpoint", "RUN", "--output", "model"]) == 0
    script = runpy.run_path(str(ROOT / "examples" / "tiny_diffusion_gemma.py"))
    script["make"](str(ROOT / "tests" / "fixtures" / "gsm8k_chat_64.jsonl"), "tiny_gemma", vocab_size=300)
    base = {"model": {"pretrained_model_name_or_path": str(tmp_path / "model")}}
    train_tiny(tiny.config(tmp_path / "ADAPTER", peft={"r": 2}, step_scheduler__max_steps=1) | base)
    for page in PAGES:
        if page.name == "CONTRIBUTING.md":  # signatures of a protocol, not statements
            continue
        names: dict = {}
        for body in blocks(page, "python"):
            exec(compile(body, f"{page.name}: python", "exec"), names)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
