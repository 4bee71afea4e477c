"""Reading checkpoints: sound ones by role, and a table of broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from whalepod.errors import CheckpointError, ConfigError
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.headers import INDEX
from whalepod.model.tiny import make_tiny

Damage = Callable[[Path], None]


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return damage


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Replace a tensor in its shard; None removes it from shard and index."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        shard = folder / index["weight_map"][name]
        tensors = load_file(shard)
        new = change(tensors.pop(name))
        if new is None:
            del index["weight_map"][name]
            (folder / INDEX).write_text(json.dumps(index))
        else:
            tensors[name] = new.contiguous()
        save_file(tensors, shard)

    return damage


def add_tensor(name: str) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        shard = sorted(set(index["weight_map"].values()))[0]
        save_file({**load_file(folder / shard), name: torch.zeros(2)}, folder / shard)
        index["weight_map"][name] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def second_shard(change: Callable[[Path], object]) -> Damage:
    return lambda folder: change(sorted(folder.glob("*-of-*"))[1]) and None  # type: ignore[func-returns-value]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def rename_dtype(folder: Path) -> None:
    path = sorted(folder.glob("*-of-*"))[0]
    raw = path.read_bytes()
    assert b'"dtype":"I64"' in raw
    path.write_bytes(raw.replace(b'"dtype":"I64"', b'"dtype":"X64"'))


def misplace(data: dict[str, Any]) -> None:
    first, second, *_ = sorted(set(data["weight_map"].values()))
    name = next(n for n, shard in data["weight_map"].items() if shard == first)
    data["weight_map"][name] = second


E0 = "layers.0.ffn.experts.0.w1.weight"
BROKEN: dict[str, tuple[Damage, list[str]]] = {
    "missing tensor": (
        edit_tensor("layers.1.attn.wkv.weight", lambda t: None),
        ["1 tensor(s) missing", "layers.1.attn.wkv.weight", "F8_E4M3", "[128, 256]"],
    ),
    "missing scale": (
        edit_tensor("layers.2.attn.wq_a.scale", lambda t: None),
        ["layers.2.attn.wq_a.scale", "F8_E8M0"],
    ),
    "misshapen": (
        edit_tensor("layers.1.attn.attn_sink", lambda t: t[:3]),
        ["model-0000", "layers.1.attn.attn_sink", "[3]", "[4]"],
    ),
    "transposed": (
        edit_tensor(
            "layers.0.attn.wq_b.weight",
            lambda t: t.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn),
        ),
        ["layers.0.attn.wq_b.weight", "[128, 512]", "[512, 128]"],
    ),
    "wrong type": (
        edit_tensor("norm.weight", lambda t: t.float()),
        ["norm.weight", "is F32", "expected BF16"],
    ),
    "unknown type": (rename_dtype, ["unknown dtype X64", "tid2eid"]),
    "truncated shard": (second_shard(cut), ["-00002-of-", "truncated", "ends at byte"]),
    "missing shard": (second_shard(Path.unlink), ["-00002-of-", "does not exist"]),
    "unreadable shard": (
        second_shard(lambda p: (p.unlink(), p.mkdir())),
        ["-00002-of-", "cannot be read", "Is a directory", "for user"],
    ),
    "garbage shard": (
        second_shard(lambda p: p.write_bytes(b"\xff" * 4096)),
        ["-00002-of-", "safetensors header"],
    ),
    "empty shard": (second_shard(lambda p: p.write_bytes(b"")), ["-00002-of-", "0 bytes"]),
    "index points elsewhere": (edit_json(INDEX, misplace), ["should be in", "but it is in"]),
    "index is no index": (edit_json(INDEX, lambda d: d.pop("weight_map")), ["weight_map"]),
    "expert_dtype fp8, experts fp4": (
        edit_json("config.json", lambda d: d.update(expert_dtype="fp8")),
        [E0, "is I8", "expected F8_E4M3", "'fp8'"],
    ),
    "DSpark keys": (
        edit_json("config.json", lambda d: d.update(dspark_block_size=5)),
        ["DSpark", "dspark_block_size", "expected an MTP block"],
    ),
    "DSpark tensors": (add_tensor("mtp.0.main_proj.weight"), ["DSpark", "mtp.0.main_proj.weight"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_named_before_anything_starts(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    damage, facts = BROKEN[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    damage(folder)
    with pytest.raises(CheckpointError) as failure:
        Checkpoint.open(folder)
    for fact in [str(folder), *facts]:
        assert fact in str(failure.value)


def test_fp4_config_on_fp8_experts(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "base", "tiny-base")
    assert Checkpoint.open(folder).expert_dtype == "fp8"
    edit_json("config.json", lambda d: d.update(expert_dtype="fp4"))(folder)
    with pytest.raises(CheckpointError, match=f"{E0} is F8_E4M3, expected I8"):
        Checkpoint.open(folder)
    # The first-day configuration did not have the key: the tensors decide.
    edit_json("config.json", lambda d: d.pop("expert_dtype"))(folder)
    assert Checkpoint.open(folder).expert_dtype == "fp8"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda d: d.update(model_type="llama"), "model_type"),
        (lambda d: d.pop("hidden_size"), "hidden_size"),
        (lambda d: d.update(compress_ratios=[0, 4]), "compress_ratios has 2 entries"),
        (lambda d: d.update(o_groups=3), "o_groups 3"),
        (lambda d: d.update(num_experts_per_tok=99), "num_experts_per_tok 99"),
    ],
)
def test_wrong_configurations(
    change: Callable[[dict[str, Any]], None], fact: str, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    edit_json("config.json", change)(folder)
    with pytest.raises(ConfigError) as failure:
        Checkpoint.open(folder)
    assert fact in str(failure.value)
    assert "config.json" in str(failure.value)


def test_absent_and_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory for user"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        Checkpoint.open(tmp_path)


def test_a_nan_scale_is_named_when_it_is_read(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    name = "layers.0.ffn.experts.3.w2.scale"
    nan = torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    edit_tensor(name, lambda t: nan.expand(t.shape).clone())(folder)
    with pytest.raises(CheckpointError, match=f"{name}: an E8M0 scale is NaN"):
        Checkpoint.open(folder).expert(0, 3)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("embed.weight", 0x7FC0),  # a NaN in BF16
        ("layers.2.attn.wq_b.weight", 0xFF),
        ("layers.1.hc_attn_base", 0xFF800000),  # minus infinity in FP32
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_values_that_are_not_finite_are_named_when_they_are_read(
    name: str, code: int, packed: bool, tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))

    def change(values: torch.Tensor) -> torch.Tensor:
        size = values.dtype.itemsize
        values.view(-1).view(torch.uint8)[-size:] = torch.tensor(
            list(code.to_bytes(size, "little")), dtype=torch.uint8
        )
        return values

    edit_tensor(name, change)(folder)
    checkpoint = Checkpoint.open(folder)
    read = checkpoint.packed if packed else checkpoint.tensor
    with pytest.raises(CheckpointError, match=f"1 of the .* values of tensor {name} are NaN"):
        read(name)


def test_extra_tensors_are_reported_and_copies_of_the_ends_skipped(
    tiny: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "more"))
    add_tensor("vision.tower.weight")(folder)
    add_tensor("mtp.0.head.weight")(folder)
    assert Checkpoint.open(folder).unexpected == ["vision.tower.weight"]


def test_a_role_reads_its_own_slices_only(tiny: Path) -> None:
    for count in (1, 2, 5):
        checkpoint = Checkpoint.open(tiny)
        assert checkpoint.bytes_read == 0
        for expert in range(count):
            checkpoint.expert(2, expert)
        wanted = [s for s in checkpoint.specs.values() if s.layer == 2 and s.expert == 0]
        assert checkpoint.bytes_read == count * sum(s.nbytes for s in wanted)
    checkpoint = Checkpoint.open(tiny)
    weights = checkpoint.attention([1, 2])
    assert not [n for n in weights if ".experts." in n and "shared" not in n]
    assert not [
        n for n in weights if n.startswith(("embed", "head", "layers.0", "layers.3", "mtp"))
    ]
    assert "embed.weight" in checkpoint.attention([0], embed=True)


def test_an_expert_shard_grows_with_its_slice(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    one = sum(t.nbytes for t in checkpoint.expert(0, 0))
    many = sum(t.nbytes for e in range(6) for t in checkpoint.expert(0, e))
    assert many == 6 * one == 6 * 3 * 128 * 256 * 4


def test_types_after_loading(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    weights = checkpoint.attention([1], dtype=torch.bfloat16, embed=True, head=True)
    for name in (
        "layers.1.attn.wq_a.weight",
        "embed.weight",
        "layers.1.ffn.shared_experts.w1.weight",
    ):
        assert weights[name].dtype == torch.bfloat16
    for name in (
        "head.weight",
        "layers.1.hc_attn_fn",
        "layers.1.attn.attn_sink",
        "layers.1.attn.compressor.wkv.weight",
        "layers.1.attn.compressor.ape",
        "layers.1.attn_norm.weight",
    ):
        assert weights[name].dtype == torch.float32
    gate = checkpoint.router([0, 3])
    assert gate["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert gate["layers.3.ffn.gate.bias"].dtype == torch.float32


def test_unquantised_tensors_equal_an_independent_reader(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    compared = 0
    for shard in tiny.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                spec = checkpoint.specs[name]
                if spec.stored.value in ("BF16", "F32", "I64"):
                    theirs = file.get_tensor(name)
                    ours = checkpoint.tensor(name, theirs.dtype)
                    assert torch.equal(ours, theirs.to(ours.dtype))
                    compared += 1
    assert compared > 100


def test_a_single_file_without_an_index(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "single"))
    tensors = {}
    for shard in sorted(folder.glob("*-of-*")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint.open(folder).unexpected == []
