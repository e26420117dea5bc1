"""LoRA adapters in PEFT's format: attached, read and written, on stacked experts, over a base in 4 bits."""

import logging

# bitsandbytes, which PEFT imports where it is installed, warns on some CPUs about an optional package of kernels.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
