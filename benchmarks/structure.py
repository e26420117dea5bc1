"""`python -m benchmarks.structure`: the package's structure in numbers, each beside its bound.

Everything but the way of a prompt is read from the source as text. A module's imports are all of its import statements:
at its top, inside functions, and under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unmask"
NETWORKS = {
    "LLaDA's network": ("unmask.models.llada.model", 5, 700),
    "DiffusionGemma's network": ("unmask.models.diffusion_gemma.model", 8, 1200),
    "the decoder trunk's network": ("unmask.models.decoder.model", 6, 700),
}
FAMILY_NAMES = re.compile(r"llada|diffusion_?gemma|(?<![a-z])dream|a2d-", re.IGNORECASE)
# Where a family's name belongs: its own folder, the table's line, the translation of another project's files, backends.
HOMES = (
    "unmask/models/llada/", "unmask/models/diffusion_gemma/", "unmask/models/decoder/", "unmask/models/registry.py",
    "unmask/automodel.py", "unmask/sampling/backends/",
)  # fmt: skip
# What a prompt's way is asked of: each of these happens once between the command line and the first network call.
ONCE = ("encode_prompts", "resolve_settings", "backend_for", "plan_folder", "load_tokenizer")


@dataclass(frozen=True)
class Measure:
    """One number and the most that it may be; None = only shown."""

    name: str
    value: int
    most: int | None = None
    where: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        return self.most is None or self.value <= self.most


def modules() -> dict[str, Path]:
    """Return the package's modules by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the package's modules that a file imports, wherever in it."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            rest = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in known}
            targets |= inner | ({node.module} & known.keys() if rest else set())
    return targets


def closure(module: str, graph: dict[str, set[str]]) -> set[str]:
    """Return a module and all that it imports, directly or not."""
    seen, queue = set(), [module]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += graph[name]
    return seen


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or not."""
    reach = {name: closure(name, graph) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def function_imports(path: Path) -> int:
    """Count the import statements inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside |= {id(node) for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))}
    return len(inside)


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield names and strings of a file with their lines, without docstrings and comments, which cite sources."""
    text = path.read_text(encoding="utf-8")
    prose: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string by itself is a docstring
            prose |= {
                (item.lineno, item.end_lineno or item.lineno)
                for item in body
                if isinstance(item, ast.Expr)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type != tokenize.COMMENT and not any(first <= line <= last for first, last in prose):
            yield line, token.string


def family_names() -> list[str]:
    """Return where code outside the families' homes names a family."""
    found = []
    for path in modules().values():
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(HOMES):
            hits = {line for line, text in code_lines(path) if FAMILY_NAMES.search(text)}
            found += [f"{place}:{line}" for line in sorted(hits)]
    return found


def type_tests() -> list[str]:
    """Return where code asks for the class of settings or of a family's configuration, or for `has_canvases`."""
    pattern = re.compile(r"isinstance\([^()]*(?:\([^()]*\))?[^()]*, *\(?\w*(?:Settings|Config|Family)\b|has_canvases")
    found = []
    for path in modules().values():
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith((*HOMES[:2], "unmask/automodel.py", "unmask/sampling/backends/")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{place}:{number}" for number, line in enumerate(lines, start=1) if pattern.search(line)]
    return found


def count() -> list[Measure]:
    """Measure everything that the source alone tells."""
    known = modules()
    graph = {name: imports_of(path, known) for name, path in known.items()}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    lines = {path: path.read_bytes().count(b"\n") for path in files}
    inner = Counter({name: function_imports(path) for name, path in known.items()})
    loops = circles(graph)
    measures = [
        Measure("files in unmask/", len(files), 205),
        Measure("lines in unmask/", sum(lines.values()), 31000),
        Measure("imports inside functions", sum(inner.values()), 60, _most(inner)),
        Measure("import circles", len(loops), 0, tuple(" ↔ ".join(sorted(group)) for group in loops)),
        Measure("family names outside their homes", len(names := family_names()), 0, tuple(names)),
        Measure("tests by class of settings or family", len(tests := type_tests()), 0, tuple(tests)),
        *_commands(known, lines),
    ]
    for label, (module, most_files, most_lines) in NETWORKS.items():
        needed = [known[name] for name in closure(module, graph) if lines[known[name]]]
        shown = tuple(f"{path.relative_to(ROOT)} {lines[path]}" for path in sorted(needed))
        measures.append(Measure(f"{label}, files", len(needed), most_files, shown))
        measures.append(Measure(f"{label}, lines", sum(lines[path] for path in needed), most_lines))
    return measures


def _commands(known: dict[str, Path], lines: dict[Path, int]) -> list[Measure]:
    longest = max((path for name, path in known.items() if name.startswith("unmask.commands.")), key=lines.__getitem__)
    return [Measure("longest file in commands/, lines", lines[longest], 80, (longest.name,))]


def _most(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{name} {number}" for name, number in counts.most_common(12) if number)


def prompt_path() -> list[Measure]:
    """Follow a prompt from `unmask generate`'s command line to the first call of a network.

    A file is on the way where a function of it was given the prompt: its text, its token ids, or a container of either.
    """
    import torch

    from unmask.cli import main
    from unmask.models.llada.model import LLaDA

    text = "What is 2 plus 5?"
    calls: Counter[str] = Counter()
    run: set[str] = set()
    way: list[str] = []
    ids: list[int] = []

    class Reached(Exception):
        pass

    def holds(value: Any, depth: int = 0) -> bool:
        if isinstance(value, str):
            return text in value
        if isinstance(value, torch.Tensor):
            return bool(ids) and value.dtype == torch.long and value.numel() >= len(ids) and _within(ids, value)
        if isinstance(value, dict):
            return depth < 4 and any(holds(item, depth + 1) for item in value.values())
        if isinstance(value, (list, tuple)):
            if ids and len(value) >= len(ids) and list(value[: len(ids)]) == ids:
                return True
            return depth < 4 and any(holds(item, depth + 1) for item in value[:8])
        fields = getattr(value, "__dict__", None)
        return depth < 3 and isinstance(fields, dict) and any(holds(item, depth + 1) for item in list(fields.values()))

    def profile(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(PACKAGE)):
            return
        place = Path(name).relative_to(ROOT).as_posix()
        calls[frame.f_code.co_name] += 1
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED and not frame.f_code.co_name.startswith("<"):  # no class body
            run.add(place)
        if frame.f_code.co_name == "forward" and "/models/" in name:
            raise Reached
        if any(holds(value) for value in list(frame.f_locals.values())) and (not way or way[-1] != place):
            way.append(place)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tiny_checkpoint(Path(folder), LLaDA)
        ids += tokenizer(text)["input_ids"]
        sys.setprofile(profile)
        try:
            main(
                [
                    "generate",
                    "--checkpoint",
                    folder,
                    "--prompt",
                    text,
                    "--raw",
                    "--max_new_tokens",
                    "8",
                    "--device",
                    "cpu",
                ]
            )
        except Reached:
            pass
        finally:
            sys.setprofile(None)
    command = sum(place == "unmask/commands/generate.py" for place in way)
    return [
        Measure("a prompt's way: files", len(set(way)), 15, tuple(dict.fromkeys(way))),
        Measure("a prompt's way: times that commands/generate.py is entered", command, 1),
        Measure("files of which anything runs before the first network call", len(run), None, tuple(sorted(run))),
        *(Measure(f"a prompt's way: calls of {name}", calls[name], 1) for name in ONCE),
    ]


def _within(ids: list[int], value: Any) -> bool:
    rows = value.reshape(-1, value.shape[-1]).tolist() if value.dim() else []
    return any(row[: len(ids)] == ids for row in rows)


def _tiny_checkpoint(folder: Path, network: Any) -> Any:
    """Write a small checkpoint with a word tokenizer; return the tokenizer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from unmask.models.llada.family import parse_config
    from unmask.models.llada.model import initialise

    values = {
        "model_type": "llada", "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 16, "vocab_size": 64,
        "embedding_size": 64, "max_sequence_length": 64, "mask_token_id": 63, "eos_token_id": 62, "pad_token_id": 62,
    }  # fmt: skip
    model = network(parse_config(values, "model"))
    initialise(model, torch.Generator().manual_seed(0))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LLaDAModelLM"], **values}))
    words = {word: number for number, word in enumerate(("[UNK]", "What", "is", "2", "plus", "5", "?"))}
    words.update({"<eos>": 62, "<mask>": 63})
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="[UNK]", mask_token="<mask>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def table(measures: list[Measure]) -> str:
    """Return the numbers as lines of text, with the places of those that miss their bound."""
    lines = []
    for measure in measures:
        bound = "" if measure.most is None else f"at most {measure.most}" + ("" if measure.met else ", MISSED")
        lines.append(f"{measure.name:62} {measure.value:6}   {bound}")
        if not measure.met or "--where" in sys.argv:
            lines += [f"    {place}" for place in measure.where]
    return "\n".join(lines)


def main() -> int:
    """Print everything; the exit status is 1 when a bound is missed."""
    measures = [*count(), *prompt_path()]
    print(table(measures))
    return int(not all(measure.met for measure in measures))


if __name__ == "__main__":
    sys.exit(main())
