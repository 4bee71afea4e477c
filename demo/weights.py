"""Parameters on disk between training and export: files below 16 MB, matrices in bf16."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from demo.net.basic import Params

_LIMIT = 15_500_000
_WIDE = ("hc_", "attn_sink", ".ape", "gate.bias", "tid2eid")


def save_parts(params: Params, folder: Path) -> None:
    """Write `part-*.pt`; what the release stores in fp32 keeps it, the rest is bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in params.items():
        kept = value.detach().cpu()
        if "tid2eid" in name:
            kept = kept.to(torch.int16)
        elif not any(key in name for key in _WIDE):
            kept = kept.to(torch.bfloat16)
        if used + kept.nbytes > _LIMIT:
            parts.append({})
            used = 0
        parts[-1][name] = kept.clone()
        used += kept.nbytes
    for old in folder.glob("part-*.pt"):
        old.unlink()
    for i, part in enumerate(parts):
        torch.save(part, folder / f"part-{i}.pt")


def load_parts(folder: Path) -> Params:
    """All parameters in fp32 (tables int64). Raises FileNotFoundError when there are none."""
    paths = sorted(folder.glob("part-*.pt"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no part-*.pt; run demo.train first")
    found: Params = {}
    for path in paths:
        for name, value in torch.load(path, map_location="cpu").items():
            found[name] = value.long() if "tid2eid" in name else value.float()
    return found
