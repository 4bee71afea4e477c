"""The tensor table against the published totals of the two released models."""

from pathlib import Path

import pytest

from whalepod.model.inspection import inspect_config
from whalepod.model.names import Role, tensor_specs
from whalepod.model.shape import ModelConfig

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
# bytes and tensors of model.safetensors.index.json; parameters counted from the tensor headers
RELEASED = {
    "pro": (864_704_792_696, 145_116, 1_572_997_201_763 + 25_840_145_979),
    "flash": (159_609_485_896, 69_187, 284_332_240_471 + 6_610_048_891),
}


@pytest.mark.parametrize("name", RELEASED)
def test_totals_equal_the_release(name: str) -> None:
    size, tensors, parameters = RELEASED[name]
    path = CONFIGS / f"deepseek-v4-{name}.json"
    specs = tensor_specs(ModelConfig.from_file(path))
    assert sum(s.nbytes for s in specs.values()) == size
    assert len(specs) == tensors
    assert sum(s.parameters for s in specs.values()) == parameters
    assert inspect_config(path).splitlines()[-1] == f"total_bytes {size} tensors {tensors}"


def test_every_tensor_has_one_role_and_scales_follow_their_matrix() -> None:
    specs = tensor_specs(ModelConfig.from_file(CONFIGS / "deepseek-v4-flash.json"))
    for spec in specs.values():
        if spec.scale is not None:
            assert specs[spec.scale].role is spec.role
            assert specs[spec.scale].expert == spec.expert
    mtp = [s for n, s in specs.items() if n.startswith("mtp.0.")]
    assert {s.layer for s in mtp} == {43}
    assert {s.role for s in mtp} == {Role.ATTENTION, Role.SHARED, Role.ROUTER, Role.EXPERT}
    assert not [n for n in specs if n.startswith("mtp.") and ("compressor" in n or "tid2eid" in n)]


def test_base_checkpoints_hold_fp8_experts() -> None:
    config = ModelConfig.from_file(CONFIGS / "deepseek-v4-flash.json")
    base = tensor_specs(config, "fp8")
    assert base["layers.3.ffn.experts.7.w1.weight"].shape == (2048, 4096)
    assert base["layers.3.ffn.experts.7.w1.scale"].shape == (16, 32)
    # Published size of Flash-Base: about 294.7 GB.
    assert abs(sum(s.nbytes for s in base.values()) / 294.7e9 - 1) < 0.01
