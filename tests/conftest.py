"""What every test stands on: no network, no cache of the user's, one thread, the same random examples each time.

The environment is set before any test imports torch, transformers or matplotlib, and subprocesses inherit it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

_HF_HOME = tempfile.mkdtemp(prefix="unmask-tests-hf-")

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=_HF_HOME,
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
)

# Colours and widths would depend on where the tests run.
for _name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"):
    os.environ.pop(_name, None)

_MEASURED = pytest.StashKey[list[str]]()

settings.register_profile("unmask", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("unmask")


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show what tests have measured; of tests in other processes (-n) nothing is told."""
    if lines := config.stash.get(_MEASURED, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that state the longest limits, so that no worker is left alone with one at the end."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker else 0.0

    items.sort(key=limit, reverse=True)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that takes a line to show when all tests are over."""
    return request.config.stash.setdefault(_MEASURED, []).append


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the golden data that lies beside the tests."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that opens a page in Chromium and returns what it then is, as HTML.

    Arguments: the page, what follows its address, and more of Chromium's flags.
    """
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.fail("no Chromium; install it: apt-get install --no-install-recommends chromium-headless-shell")
    folder = tmp_path_factory.mktemp("pages")

    def show(page: str, address: str = "", *flags: str) -> str:
        path = folder / "page.html"
        path.write_text(page, "utf-8")
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
        words += ["--virtual-time-budget=10000", "--dump-dom", f"{path.as_uri()}{address}"]
        done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return show


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let a test race: that needs two threads, and more elements than one is given at a time (32,768)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def meta_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The meta device in the place of a Hopper GPU: networks of any size run on it, without numbers or autocast."""
    import torch

    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def nothing_for_meta(kind: str, *arguments: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", nothing_for_meta)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    return torch.device("meta")


@pytest.fixture(scope="session")
def gemma_values() -> Callable[..., dict]:
    """Return a function that makes a tiny DiffusionGemma's config.json.

    `canvas_length` goes to the top, other keywords into text_config. Full layers have heads of their own size and
    number, the window is shorter than most inputs.
    """

    def make(canvas_length: int = 8, **text: object) -> dict:
        sizes = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
            "sliding_window": 5, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8,
            "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
            "use_bidirectional_attention": "vision",
        }  # fmt: skip
        vision = {
            "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
        }  # fmt: skip
        ids = {"boi_token_id": 36, "eoi_token_id": 37, "image_token_id": 38}
        top = {"model_type": "diffusion_gemma", "canvas_length": canvas_length, **ids}
        return {**top, "text_config": {**sizes, **text}, "vision_config": vision}

    return make


@pytest.fixture(scope="session")
def gemma_reference(gemma_values: Callable[..., dict]) -> Callable[..., Any]:
    """Return a function that makes transformers' own DiffusionGemma, small, with every tensor random.

    Keywords as for `gemma_values`. Norms, scales and the layer scalars of both roles are random too: none can hide.
    """

    def make(seed: int = 0, **fields: object) -> Any:
        import torch
        from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

        values = gemma_values(**fields)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**values))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.dim() >= 2:
                    tensor.copy_(noise * tensor.shape[-1] ** -0.5)
                elif "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
                    tensor.copy_(1 + 0.3 * noise)
        model.set_experts_implementation("eager")  # its grouped kernel does not take every size
        return model.eval()

    return make


class TinyFiles:
    """What a training run of a second needs: a byte-level tokenizer, chat rows, and a configuration that names them.

    Attributes:
        folder: holds `tokenizer/`, `train.jsonl` (24 rows) and `valid.jsonl` (6 rows).
        model: fields of a fresh LLaDA with 264 ids.
        placed: the `distributed` section of its configurations.
    """

    def __init__(self, folder: Path) -> None:
        self.placed: dict[str, object] = {"device": "cpu"}
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        self.folder = folder
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        controls = ["startoftext", "endoftext", "start_header_id", "end_header_id", "eot_id", "mdm_mask"]
        tokenizer.add_special_tokens([AddedToken(f"<|{text}|>", special=True, normalized=False) for text in controls])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>"
        )
        fast.save_pretrained(folder / "tokenizer")
        self.model = {
            "model_type": "llada",
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "mlp_hidden_size": 48,
            "vocab_size": 264,
            "max_sequence_length": 96,
            "mask_token_id": 261,
            "eos_token_id": 257,
            "pad_token_id": 257,
        }
        self._write_rows("train.jsonl", range(24))
        self._write_rows("valid.jsonl", range(100, 106))

    def _write_rows(self, name: str, numbers: range) -> None:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{n} plus {n % 7}?"},
                    {"role": "assistant", "content": "so " * (n % 5) + f"it is {n + n % 7}."},
                ]
            }
            for n in numbers
        ]
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def config(self, run_dir: Path, **changes: object) -> dict:
        """Return a configuration of six steps in which each dotted key, its dots written `__`, is replaced."""
        values: dict = {
            "model": {"config": dict(self.model)},
            "dataset": {
                "path_or_dataset_id": str(self.folder / "train.jsonl"),
                "tokenizer": str(self.folder / "tokenizer"),
                "chat_template": "llada",
                "seq_length": 96,
            },
            "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 6},
            "optimizer": {"lr": 3e-3},
            "distributed": dict(self.placed),
            "checkpoint": {"checkpoint_dir": str(run_dir)},
        }
        for key, value in changes.items():
            *sections, name = key.split("__")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        return values

    def validation(self, **changes: object) -> dict:
        """Return a `validation_dataset` section."""
        return {
            "path_or_dataset_id": str(self.folder / "valid.jsonl"),
            "tokenizer": str(self.folder / "tokenizer"),
            "chat_template": "llada",
            "seq_length": 96,
            **changes,
        }

    def write(self, path: Path, values: dict) -> Path:
        """Write a configuration as YAML."""
        import yaml

        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path


@dataclass(frozen=True)
class TinyRun:
    """A finished training run: how it ended, what it logged, where it lies, what it printed."""

    outcome: object
    events: list[dict]
    root: Path
    output: str

    @property
    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.events if event["event"] == "train"}


@pytest.fixture(scope="session")
def tiny_base(tiny: TinyFiles, train_tiny: Callable[..., TinyRun], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of the tiny model, for adapters to be trained on."""
    return train_tiny(tiny.config(tmp_path_factory.mktemp("base"), step_scheduler__max_steps=1)).root / "step_1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def train_tiny() -> Callable[..., TinyRun]:
    """Return a function that trains in this process, as `unmask train` does; options are run_training's.

    Without `draw=True` no loss.png is drawn, which would take longer than the training.
    """

    def train(values: dict, draw: bool = False, **options: object) -> TinyRun:
        from rich.console import Console

        from unmask import assemble
        from unmask.assemble import run_training
        from unmask.config import config_from_mapping
        from unmask.prepare import prepare
        from unmask.report.metrics import FILE, read_metrics

        root, printed = Path(values["checkpoint"]["checkpoint_dir"]), io.StringIO()
        with contextlib.nullcontext() if draw else mock.patch.object(assemble, "_draw_curve"):
            outcome = run_training(prepare(config_from_mapping(values)), Console(file=printed, width=400), **options)
        return TinyRun(outcome, read_metrics(root / FILE), root, printed.getvalue())

    return train
