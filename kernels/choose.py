"""The indexer's choice for all rows of a pass: score the entries each row sees, keep the best.

Legend: T rows, H index heads, I index_head_dim, F pool rows, K entries kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whalepod.kernels.attend import Listed
from whalepod.kernels.registry import Kernel
from whalepod.kernels.select import select


@Kernel
def choose_entries(
    q_THI: Tensor, gate_TH: Tensor, keys_FI: Tensor, listed: Listed, keep: int
) -> Listed:
    """Keep the `keep` best entries of each row: `score[e] = sum_h gate[h] * relu(q[h] . key[e])`.

    Args:
        q_THI, gate_TH: fp32; the gate holds the score's scale.
        keys_FI: index keys by pool row.
        listed: the entries each row sees.

    Returns:
        at most `keep` entries a row, in the order they were listed; among equal scores the first.
    """
    chosen = torch.zeros(q_THI.shape[0], keep, dtype=torch.int64, device=q_THI.device)
    counts = listed.count_T.clamp(max=keep)
    for t, (offset, count) in enumerate(
        zip(listed.offset_T.tolist(), listed.count_T.tolist(), strict=True)
    ):
        own = listed.rows[offset : offset + count]
        if count > keep:
            scores = gate_TH[t] @ (q_THI[t] @ keys_FI[own].t()).relu()
            own = own[select(scores.unsqueeze(0), keep)[0]]
        chosen[t, : len(own)] = own
    starts = torch.arange(q_THI.shape[0], device=q_THI.device) * keep
    return Listed(chosen.flatten(), starts, counts, min(keep, listed.most))
