"""`python -m unmask.train -c CONFIG.yaml`: the same as `unmask train`, for launchers that start a module."""

from __future__ import annotations

import sys

from unmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
