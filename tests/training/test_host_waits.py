"""Law: a step waits for its device, and makes tensors on the host, in the places that are listed here and nowhere else.

Steps run on the meta device, which has no numbers to wait for; a mode sees every operation, in both directions.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unmask
from unmask.batch import Batch
from unmask.config.model import PeftConfig
from unmask.distributed.expert_parallel import expert_dispatch, narrow_experts
from unmask.distributed.runtime import Runtime
from unmask.models.diffusion_gemma.model import gelu
from unmask.models.experts import Experts
from unmask.models.loading import empty_network
from unmask.models.registry import family_named
from unmask.objectives.canvas import CanvasDiffusion
from unmask.objectives.mdlm import MDLM
from unmask.ops.soft_embedding import soft_embedding
from unmask.rng import NoiseStream
from unmask.training.lora import attach
from unmask.training.step import train_step

# Functions that may work on the host or wait for the device, and why.
HOST = {
    "_moved": "brings the batch to the device",
    "_global_counts": "counts the batch, which is on the host",
    "rounded": "rounds a number on the host, once for each dtype",
    "train_step": "reads what is logged of a step: the one wait of it",
    "expert_dispatch": "reads how many rows go to which rank and come from it: the one wait of an exchange",
}
# Those that do so with all that they call.
HOST_WITH_CALLEES = {"corrupt": "noise is drawn on the host, where it is the same for every device"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "repeat_interleave"}
PACKAGE = str(Path(unmask.__file__).parent)


class HostWatch(TorchDispatchMode):
    """Raise where a tensor of the host is made or met, or a device is waited for, outside the functions listed above.

    Where one of those reads from the device, it is given ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given: list[Tensor] = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations += 1
        masked = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in given[1:])
        if "meta" in {tensor.device.type for tensor in given} and (
            masked or name in READS or (name == "_to_copy" and str(kwargs.get("device")) == "cpu")
        ):
            self.waits[self.listed(f"{name} waits for the device")] += 1
            return torch.ones(given[0].shape, dtype=given[0].dtype)
        made = func(*args, **kwargs)
        if any(leaf.device.type == "cpu" for leaf in [*given, *tree_leaves(made)] if isinstance(leaf, Tensor)):
            self.listed(f"{name} has a tensor on the host")
        return made

    def listed(self, what: str) -> str:
        """Return the package's function that did it; AssertionError for one that is not listed."""
        stack = [f for f, _ in traceback.walk_stack(None) if f.f_code.co_filename.startswith(PACKAGE)]
        # A qualified name has the functions in whose body one was written, such as a generator's.
        names = [frame.f_code.co_qualname.split(".") for frame in stack]
        own, all_of_them = HOST.keys() & set(sum(names[:1], [])), HOST_WITH_CALLEES.keys() & set(sum(names, []))
        if own or all_of_them:
            return (own or all_of_them).pop()
        place = f"{stack[0].f_code.co_filename}:{stack[0].f_lineno}" if stack else "outside the package"
        raise AssertionError(f"{place}: {what}")


@pytest.fixture
def watch(meta_gpu: torch.device) -> HostWatch:
    return HostWatch()


@pytest.fixture
def networks(gemma_values: Callable[..., dict], tiny: Any, meta_gpu: torch.device) -> Callable[[str], nn.Module]:
    """Return a function that makes a small network in bf16 on the meta device; heads are grouped in both."""

    def make(family: str) -> nn.Module:
        values = gemma_values() if family == "diffusion_gemma" else {**tiny.model, "n_kv_heads": 1}
        chosen = family_named(values, "config.json")
        with meta_gpu:
            return empty_network(chosen, chosen.parse_config(values, "config.json")).bfloat16()

    return make


def ragged_batch() -> Batch:
    """Three rows of unequal length with prompts of unequal length."""
    position_BL = torch.arange(40)[None].expand(3, -1)
    real_BL = position_BL < torch.tensor([40, 31, 25])[:, None]
    supervised_BL = real_BL & (position_BL >= torch.tensor([7, 3, 20])[:, None])
    rows = torch.arange(3)
    ids_BL = torch.where(real_BL, position_BL % 20 + 2, 0)
    lengths_B, cut_B = supervised_BL.sum(1), torch.zeros(3, dtype=torch.bool)
    return Batch(ids_BL, supervised_BL, real_BL, lengths_B, rows, 0, rows, 3, cut_B, rows)


@pytest.mark.parametrize("way", ["full", "checkpointed", "lora", "dora", "frozen encoder", "no conditioning"])
@pytest.mark.parametrize("family", ["llada", "diffusion_gemma"])
def test_a_step_waits_once(networks, watch: HostWatch, meta_gpu: torch.device, family: str, way: str) -> None:
    model = networks(family).train()
    config: Any = model.config
    objective: Any = MDLM(config.mask_token_id, eps=0.2)
    if family == "diffusion_gemma":
        options = {
            "stop_gradient_to_encoder": way == "frozen encoder",
            "self_conditioning_p": 0.5 * (way != "no conditioning"),
        }
        objective = CanvasDiffusion(config.canvas_length, config.vocab_size, config.eos_token_id, **options)
    for module in model.modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = way == "checkpointed"
    if way in ("lora", "dora"):
        stacks = ["*.experts.*"] if way == "lora" and family == "diffusion_gemma" else None
        section = PeftConfig(r=8, target_modules=["*.q_proj"], target_parameters=stacks, use_dora=way == "dora")
        attach(model, section, "")
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    runtime, batches = Runtime(meta_gpu, None), [ragged_batch(), ragged_batch()]
    with watch:
        train_step(model, objective, batches, NoiseStream(3), optimizer, runtime, 1.0)
    assert watch.waits == {"train_step": 1} and watch.operations > 100


def test_a_sampler_s_passes_wait_nowhere(networks, watch: HostWatch, meta_gpu: torch.device) -> None:
    canvases, masks = networks("diffusion_gemma").eval(), networks("llada").eval()
    ids_BL, keep_BL = (torch.zeros(3, 12, dtype=kind, device=meta_gpu) for kind in (torch.int64, torch.bool))
    canvas_BC = ids_BL[:, : canvases.config.canvas_length]  # pyright: ignore[reportAttributeAccessIssue]
    starts_K = torch.zeros(3, dtype=torch.int64, device=meta_gpu)
    with torch.no_grad(), watch:
        encoded = canvases.encode(ids_BL)
        for past in (encoded, canvases.encode(ids_BL, keep_BL), canvases.encode(canvas_BC, past=encoded)):
            hidden_BCD = canvases.decode(canvas_BC, past)
            mixed_ND = soft_embedding(hidden_BCD.flatten(0, 1), canvases.head)
            canvases.decode(canvas_BC, past, mixed_ND.view_as(hidden_BCD), starts=[12, 7, 3], starts_K=starts_K)
        masks.logits(masks(ids_BL))
        masks.logits(masks(ids_BL, keep_BL, ids_BL))
    assert not watch.waits


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A group of two of which this process is the first; what the other would send is made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_an_exchange_of_tokens_waits_once(watch: HostWatch, meta_gpu: torch.device, two_ranks: Any) -> None:
    with meta_gpu:
        experts = Experts(4, 8, 8, gelu).bfloat16()
        narrow_experts(experts, 0, 2)
        # As many pairs as experts: the watch says one of each.
        hidden_ND = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
        chosen_NT, weights_NT = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    with watch:
        mixed_ND = expert_dispatch(two_ranks)(hidden_ND, chosen_NT, weights_NT, experts)
        mixed_ND.float().square().sum().backward()
    assert watch.waits == {"expert_dispatch": 1} and hidden_ND.grad is not None


@pytest.mark.parametrize(
    "touch",
    [
        lambda there: there.sum().item(),
        lambda there: there.tolist(),
        lambda there: there.nonzero(),
        lambda there: there[there > 0],
        lambda there: there.cpu(),
        lambda there: there + torch.tensor([1.0, 2.0]).to(there.device),
        lambda there: torch.arange(2),
    ],
)
def test_the_watch_sees(touch: Callable[[Tensor], Any], watch: HostWatch, meta_gpu: torch.device) -> None:
    there = torch.zeros(2, device=meta_gpu)
    with watch, pytest.raises(AssertionError, match="waits for the device|on the host"):
        touch(there)
