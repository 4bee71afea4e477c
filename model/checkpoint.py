"""Read a checkpoint in the released DeepSeek-V4 format, slice by slice.

Opening checks every tensor's name, shape and type against the configuration, from the headers
alone. A role then reads only its own bytes, dequantised to the compute type.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whalepod.errors import CheckpointError
from whalepod.kernels import fp4, fp8_linear
from whalepod.kernels.fp4 import Fp4Stack
from whalepod.kernels.fp8_linear import Fp8Matrix
from whalepod.model.headers import Entry, read_folder
from whalepod.model.names import ExpertDtype, Role, Stored, TensorSpec, tensor_specs
from whalepod.model.quant import decode_fp4, decode_fp8, how_many_spoilt
from whalepod.model.shape import ModelConfig

_TORCH = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Copies of the main model's tensors that some exports put under mtp; the main ones are used.
_COPIES = ("embed.weight", "emb.tok_emb.weight", "head.weight")
_FEW = 5


class Checkpoint:
    """An opened and verified checkpoint folder.

    Attributes:
        path, config: the folder and its `config.json`.
        specs: what must be there, by name. entries: where it is.
        unexpected: names in the files that the model does not know (a warning to print).
        bytes_read: tensor bytes read so far.
    """

    def __init__(self, path: Path, config: ModelConfig, entries: dict[str, Entry]) -> None:
        self.path, self.config, self.entries = path, config, entries
        self.expert_dtype = _expert_dtype(path, config, entries)
        self.specs = tensor_specs(config, self.expert_dtype)
        self.unexpected = sorted(set(entries) - set(self.specs) - _copies(entries))
        self.bytes_read = 0

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check configuration and headers.

        Raises:
            ConfigError: `config.json` is absent or wrong.
            CheckpointError: a file or tensor is; the message names file, tensor, found, expected.
        """
        folder = Path(path)
        config = ModelConfig.from_file(folder / "config.json")
        checkpoint = cls(folder, config, read_folder(folder))
        checkpoint.verify()
        return checkpoint

    def verify(self) -> None:
        """Check every expected tensor. Raises CheckpointError."""
        drafter = [n for n in self.entries if n.startswith("mtp.") and "main_proj" in n]
        if self.config.num_nextn_predict_layers and (self.config.is_dspark or drafter):
            raise CheckpointError(
                f"{self.path}: mtp.* is a DSpark drafter "
                f"({drafter[0] if drafter else 'config.json has dspark_block_size'}), expected an "
                "MTP block; set num_nextn_predict_layers to 0 in config.json to serve without it"
            )
        missing = [spec for name, spec in self.specs.items() if name not in self.entries]
        if missing:
            names = ", ".join(s.name for s in missing[:_FEW])
            more = f" and {len(missing) - _FEW} more" if len(missing) > _FEW else ""
            first = missing[0]
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensor(s) missing: {names}{more}; expected "
                f"{first.name} as {first.stored.value} {list(first.shape)}"
            )
        for name, spec in self.specs.items():
            self._check(spec, self.entries[name])

    def tensor(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Read one tensor, dequantised.

        Returns:
            `dtype`, but fp32 for what the model keeps in fp32, and int64 for tables.
        """
        spec = self.specs[name]
        raw = self._read(name)
        if spec.stored is Stored.I64:
            return raw.to(device)
        if spec.scale is not None:
            decode = decode_fp4 if spec.stored is Stored.FP4 else decode_fp8
            try:
                raw = decode(raw, self._read(spec.scale))
            except ValueError as error:
                file = self.entries[spec.scale].file
                raise CheckpointError(f"{file}: tensor {spec.scale}: {error}") from None
        return raw.to(device, torch.float32 if spec.keep_fp32 else dtype)

    def packed(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor | Fp8Matrix:
        """Read one tensor for kernels that widen it themselves.

        Returns:
            FP8 matrices as they are, grouped ones in their groups; BF16 matrices of fp32 products
            in BF16 if that is `dtype`, which loses nothing; the rest as `tensor` does.
        """
        spec = self.specs[name]
        if spec.keep_fp32 and spec.stored is Stored.BF16 and len(spec.shape) == 2:
            return self._read(name).to(device, dtype)
        groups = self.config.o_groups if name.endswith(".attn.wo_a.weight") else 1
        tall = spec.shape[0] % (groups * fp8_linear.BLOCK) if groups > 1 else 0
        if spec.stored is not Stored.FP8 or spec.scale is None or tall:
            return self.tensor(name, dtype, device)
        raw, scale = self._read(name).to(device), self._read(spec.scale).to(device)
        try:
            return fp8_linear.pack(raw, scale, groups)
        except ValueError:  # scales that are no powers of two; `tensor` refuses what is wrong
            return self.tensor(name, dtype, device)

    def attention(
        self,
        layers: Iterable[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        embed: bool = False,
        head: bool = False,
        packed: bool = False,
    ) -> dict[str, Any]:
        """Everything the attention side of `layers` needs, shared experts included, by name.

        Args:
            packed: read matrices as `packed` does.
        """
        read = self.packed if packed else self.tensor
        roles, chosen = {Role.ATTENTION, Role.SHARED}, set(layers)
        ends = {Role.EMBED: embed, Role.HEAD: head}
        return {
            name: read(name, dtype, device)
            for name, spec in self.specs.items()
            if spec.stored is not Stored.SCALE
            and ((spec.role in roles and spec.layer in chosen) or ends.get(spec.role, False))
        }

    def router(
        self,
        layers: Iterable[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        packed: bool = False,
    ) -> dict[str, Any]:
        """The gates of `layers`, by name, in fp32; with `packed` in BF16 if that is `dtype`."""
        chosen, read = set(layers), self.packed if packed else self.tensor
        return {
            name: read(name, dtype, device)
            for name, spec in self.specs.items()
            if spec.role is Role.ROUTER and spec.layer in chosen
        }

    def expert(
        self,
        layer: int,
        expert: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One routed expert: w1 `[I, D]`, w2 `[D, I]`, w3 `[I, D]`."""
        name = self._expert_name(layer, expert)
        w1, w2, w3 = (self.tensor(f"{name}.{w}.weight", dtype, device) for w in ("w1", "w2", "w3"))
        return w1, w2, w3

    def packed_expert(
        self, layer: int, expert: int, device: torch.device | str = "cpu"
    ) -> tuple[Fp4Stack, Fp4Stack]:
        """One routed expert in FP4: gate and up projection `[1, 2I, D]`, and the down one `[1, D, I]`.

        Raises:
            CheckpointError: a scale is NaN or out of range.
        """
        (a, sa), (b, sb), (c, sc) = (
            self._fp4(layer, expert, w, device) for w in ("w1", "w2", "w3")
        )
        try:
            up = fp4.pack(torch.cat([a, c]).unsqueeze(0), torch.cat([sa, sc]).unsqueeze(0))
            return up, fp4.pack(b.unsqueeze(0), sb.unsqueeze(0))
        except ValueError as error:
            name = self._expert_name(layer, expert)
            raise CheckpointError(f"{self.path}: {name}: {error}") from None

    def _fp4(
        self, layer: int, expert: int, matrix: str, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        name = f"{self._expert_name(layer, expert)}.{matrix}"
        scale = self._read(f"{name}.scale").view(torch.uint8)
        return self._read(f"{name}.weight").to(device), scale.to(device)

    def _expert_name(self, layer: int, expert: int) -> str:
        beyond = layer - self.config.num_hidden_layers
        prefix = f"layers.{layer}" if beyond < 0 else f"mtp.{beyond}"
        return f"{prefix}.ffn.experts.{expert}"

    def everything(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The whole model, by name (small models; tests)."""
        return {
            name: self.tensor(name, dtype)
            for name, spec in self.specs.items()
            if spec.stored is not Stored.SCALE
        }

    def _read(self, name: str) -> Tensor:
        entry = self.entries[name]
        data = np.fromfile(entry.file, np.uint8, entry.end - entry.start, offset=entry.start)
        if data.nbytes != entry.end - entry.start:
            raise CheckpointError(f"{entry.file} was cut short while tensor {name} was read")
        self.bytes_read += data.nbytes
        values = torch.from_numpy(data).view(_TORCH[entry.dtype]).view(entry.shape)
        if spoilt := how_many_spoilt(values):
            raise CheckpointError(
                f"{entry.file}: {spoilt} of the {values.numel()} values of tensor {name} are NaN or "
                "infinite; the file is damaged, or was saved after a training step that diverged: "
                "download it again, or serve an earlier one"
            )
        return values

    def _check(self, spec: TensorSpec, entry: Entry) -> None:
        allowed = {spec.stored.value}
        if spec.stored is Stored.SCALE:
            allowed.add("F32")  # some -Base files hold fp32 scales
        if entry.dtype not in allowed:
            hint = ""
            if spec.role is Role.EXPERT:
                hint = f" (config.json says expert_dtype {self.config.expert_dtype!r})"
            raise CheckpointError(
                f"{entry.file}: tensor {spec.name} is {entry.dtype}, expected "
                f"{' or '.join(sorted(allowed))}{hint}"
            )
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{entry.file}: tensor {spec.name} has shape {list(entry.shape)}, expected "
                f"{list(spec.shape)} from config.json"
            )


def _expert_dtype(path: Path, config: ModelConfig, entries: dict[str, Entry]) -> ExpertDtype:
    """The configured expert type, or what the files hold where the first-day config is silent."""
    if config.expert_dtype is not None:
        return config.expert_dtype
    entry = entries.get("layers.0.ffn.experts.0.w1.weight")
    return "fp8" if entry is not None and entry.dtype == Stored.FP8.value else "fp4"


def _copies(entries: dict[str, Entry]) -> set[str]:
    return {n for n in entries if n.startswith("mtp.") and n.split(".", 2)[2] in _COPIES}
