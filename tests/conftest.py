"""What every test stands on: no network, no cache of the user's, few threads, the same random examples each time.

The environment is set before any test imports torch, transformers or matplotlib, and subprocesses inherit it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# One thread a worker when pytest-xdist shares the cores among several.
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
_HF_HOME = tempfile.mkdtemp(prefix="unmask-tests-hf-")

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=_HF_HOME,
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=_THREADS,
    MKL_NUM_THREADS=_THREADS,
    OMP_WAIT_POLICY="PASSIVE",
    GOMP_SPINCOUNT="0",
)

# Colours and widths would depend on where the tests run.
for _name in ("FORCE_COLOR", "NO_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"):
    os.environ.pop(_name, None)

settings.register_profile("unmask", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("unmask")


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the golden data that lies beside the tests."""
    return Path(__file__).parent / "fixtures"
