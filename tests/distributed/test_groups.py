"""What FSDP2 is told: which groups are freed after a forward pass, what is fetched ahead, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from unmask.config.distributed import DistributedConfig
from unmask.distributed.processes import Degrees, experts_in_place
from unmask.errors import FieldError

LAYERS = [f"model.decoder.layers.{number}" for number in range(3)]
EXPERTS = [f"{layer}.experts" for layer in LAYERS]


@pytest.mark.parametrize("dense", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_and_experts_are_freed_as_asked(gemma_values, run_ranks, dense: bool, experts: bool) -> None:
    options = {"reshard_after_forward": dense, "reshard_experts_after_forward": experts}
    for found in run_ranks(4, "grouped", gemma_values(), (4, 1, 2), options):
        expected = {"": False, **dict.fromkeys(LAYERS, dense), **dict.fromkeys(EXPERTS, experts)}
        assert found["reshards"] == expected
        # The host waits in each block, so that nothing would be fetched while it computes if it were not asked for.
        assert [found["forward"][layer] for layer in LAYERS] == [*([b, e] for b, e in pairs()[1:]), []]
        assert [found["backward"][layer] for layer in LAYERS] == [[], *([b, e] for b, e in pairs()[:-1])]


def pairs() -> list[tuple[str, str]]:
    return list(zip(LAYERS, EXPERTS, strict=True))


def test_experts_that_no_other_rank_shares_are_left_alone(gemma_values: Callable[..., dict], run_ranks) -> None:
    for found in run_ranks(2, "grouped", gemma_values(), (2, 1, 2), {}):
        assert set(found["reshards"]) == {"", *LAYERS}
        assert found["forward"][LAYERS[0]] == [LAYERS[1]] and found["backward"][LAYERS[1]] == [LAYERS[0]]
        assert found["shared"]  # a checkpoint reads and writes the memory that is trained


NARROW: dict[str, Any] = {"mp_policy": {"param_dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("degrees", "options", "expected"),
    [
        ((2, 1, 2), {}, True),
        ((2, 1, 1), {}, False),  # no expert parallelism
        ((4, 1, 2), {}, False),  # two ranks share each expert
        ((4, 2, 2), {}, False),  # two copies, whose gradients are summed
        ((2, 1, 2), {"offload_policy": "cpu"}, False),  # brought to the device for each pass
        ((2, 1, 2), NARROW, False),  # a narrow copy would be kept until backward
        ((2, 1, 2), {**NARROW, "activation_checkpointing": True}, True),
    ],
)
def test_when_fsdp_would_only_copy(degrees: tuple[int, int, int], options: dict, expected: bool) -> None:
    from unmask.config.distributed import MixedPrecisionConfig

    policy = options.get("mp_policy")
    given = {**options, "mp_policy": None if policy is None else MixedPrecisionConfig(**policy)}
    assert experts_in_place(DistributedConfig(ep_size=degrees[2], **given), Degrees(*degrees)) == expected


def test_experts_without_a_group_of_their_own_have_no_setting() -> None:
    with pytest.raises(FieldError, match="ep_size above 1"):
        DistributedConfig(reshard_experts_after_forward=False)
