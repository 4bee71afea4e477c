"""Where the rows of a pass and their entries lie, as kernels on a device read it.

Legend: T rows, S sequences of the pass (decoding ones first), B blocks of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whalepod.model.layout import Placed


@dataclass(frozen=True, slots=True)
class Paged:
    """Index tensors of a pass.

    Args:
        slots_T, starts_T: `[T]` int64: the ring of each row's sequence, and the position of the
            first of its new rows.
        sequences_T: `[T]` int32, the row of the table that is a row's.
        table_SB: `[S, B]` int32, blocks of each sequence; what lies behind its last one is not read.
    """

    slots_T: Tensor
    starts_T: Tensor
    sequences_T: Tensor
    table_SB: Tensor

    @classmethod
    def of(cls, spans: Sequence[Placed], device: torch.device | str) -> Paged:
        """Lay out spans, in row order."""
        counts = [count for _, _, _, count, _ in spans]

        def rows(values: list[int], dtype: torch.dtype) -> Tensor:
            spread = np.repeat(np.array(values, np.int64), counts)
            return torch.from_numpy(spread).to(device, dtype)

        width = max((len(blocks) for *_, blocks in spans), default=0)
        table = np.zeros((len(spans), width), np.int32)
        for row, (*_, blocks) in zip(table, spans, strict=True):
            row[: len(blocks)] = blocks
        return cls(
            rows([s[0] for s in spans], torch.int64),
            rows([s[1] for s in spans], torch.int64),
            rows(list(range(len(spans))), torch.int32),
            torch.from_numpy(table).to(device),
        )

    @classmethod
    def decoding(cls, slots_D: Tensor, positions_D: Tensor, table_DB: Tensor) -> Paged:
        """One row a sequence, with everything already on the device."""
        order = torch.arange(len(slots_D), dtype=torch.int32, device=slots_D.device)
        return cls(slots_D, positions_D, order, table_DB)
