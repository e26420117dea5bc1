"""LoRA adapters in PEFT's format: attached, read and written, on stacked experts, over a base in 4 bits."""

import logging

# PEFT imports bitsandbytes and torchao where they are installed. They warn of optional kernels that a machine lacks,
# and torch of how torchao 0.18 registers its types.
for _name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
