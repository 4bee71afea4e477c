"""Small tensors to a device and back, while it still works on something else.

From ordinary memory a copy would first wait for all that the device has to do, and what follows it would be
launched only then.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sendable(host: Tensor, device: torch.device) -> Tensor:
    """The same values where the device can fetch them by itself; freed when it has."""
    return host.pin_memory() if device.type == "cuda" else host


def upload(host: Tensor, device: torch.device) -> Tensor:
    """The same values on the device; work that is launched from here on finds them there."""
    return sendable(host, device).to(device, non_blocking=True)


def fetch(ids_N: Tensor, values_N: Tensor) -> tuple[list[int], list[float]]:
    """Whole numbers (int64) and fp32 ones of a device, in one copy; waits for them."""
    both = torch.cat([ids_N.view(torch.int32), values_N.view(torch.int32)]).cpu()
    ids, values = both.split([2 * len(ids_N), len(values_N)])
    return ids.view(torch.int64).tolist(), values.view(torch.float32).tolist()
