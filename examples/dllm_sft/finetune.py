"""Fine-tune from a configuration file: the same as `unmask train`, with the same arguments.

python examples/dllm_sft/finetune.py -c examples/dllm_sft/llada_sft.yaml --step_scheduler.max_steps 1000
"""

from __future__ import annotations

import sys

from unmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
