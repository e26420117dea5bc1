"""Write GSM8K as chat JSONL: the same as `unmask prep gsm8k`, with the same arguments.

python examples/dllm_sft/prep_gsm8k.py --help
"""

from __future__ import annotations

import sys

from unmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["prep", "gsm8k", *sys.argv[1:]]))
