"""Where the rows of a pass and their compressed entries lie, for operations over all rows at once.

Legend: T rows, S sequences of the pass, B blocks of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whalepod.kernels.attend import Listed, Rows

# Of one sequence's new tokens: slot, position of the first, its row, how many, block table.
Placed = tuple[int, int, int, int, tuple[int, ...]]


class Layout:
    """Index tensors of a pass, made once.

    Args:
        spans: the pass's sequences in row order.
        positions_T: of all rows.
        block_tokens: tokens a block of entries covers.
    """

    def __init__(self, spans: Sequence[Placed], positions_T: Tensor, block_tokens: int) -> None:
        self._block_tokens, self._positions = block_tokens, positions_T.cpu().numpy()
        self._device = positions_T.device
        known = np.array([(*s[:4], len(s[4])) for s in spans], np.int64)
        known = known.reshape(-1, 5).T
        self._of_T = np.repeat(np.arange(len(spans)), known[3])
        slot_T, start_T, first_T = (self._on(known[i][self._of_T]) for i in range(3))
        self.rows = Rows(slot_T, start_T, first_T, positions_T)
        self._blocks = np.array([b for s in spans for b in s[4]], np.int64)
        self._first_S = np.cumsum(known[4]) - known[4]

    def entries(self, ratio: int) -> tuple[Listed, Tensor, bool]:
        """The entries each row sees; the pool row of the one it closes, or -1; whether any does."""
        per, positions = self._block_tokens // ratio, self._positions
        table = (self._blocks[:, None] * per + np.arange(per)).ravel()
        offset_T, count_T = self._first_S[self._of_T] * per, (positions + 1) // ratio
        closing_T = (positions + 1) % ratio == 0
        place_T = np.where(closing_T, offset_T + count_T - 1, 0)
        closed_T = np.where(closing_T, table[place_T] if len(table) else -1, -1)
        most = int(count_T.max(initial=0))
        listed = Listed(self._on(table), self._on(offset_T), self._on(count_T), most)
        return listed, self._on(closed_T), bool(closing_T.any())

    def _on(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
