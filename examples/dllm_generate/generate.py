"""Answer prompts with a diffusion language model: the same as `unmask generate`, with the same arguments.

python examples/dllm_generate/generate.py --checkpoint GSAI-ML/LLaDA-8B-Instruct --prompt "Why is the sky blue?"
"""

from __future__ import annotations

import sys

from unmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
