"""Multi-query attention over a ring of raw keys and a list of entries, with a sink.

One form for decoding and prefill: a query's sums run in an order that its position alone decides
(the sink, the ring by slot, the entries as listed), so its bits do not depend on the batch or on
how its prompt was cut into chunks.

Legend: B groups that share keys, M queries of a group, H heads, W ring slots, E entries,
K entries of one query, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel

# The weighted sum runs block by block: a matrix product splits a longer inner dimension by its
# length, which would make a token's bits depend on its company. CPU BLAS sums fewer than 4 rows
# in another order.
_BLOCK, _LEAST_ROWS, _STEP = 128, 4, 16


@Kernel
def sink_attention(
    q_BMHD: Tensor,
    rings: tuple[Tensor, Tensor],
    slots_BM: Tensor,
    lap_BM: Tensor,
    entries: tuple[Tensor, Tensor] | None,
    sink_H: Tensor,
) -> Tensor:
    """Attend: `p_s = exp(z_s) / (sum exp(z) + exp(sink))`, `o = sum p_s kv_s`, `z = q kv / sqrt(D)`.

    Args:
        q_BMHD: `[B, M, H, D]`, fp32 or bf16.
        rings: the ring as the current lap fills it, and as the lap before left it, `[B, W, D]`
            each; one tensor twice where both are in one place. Key and value are the same vector.
        slots_BM: `[B, M]` slot of the query's own key: slots up to it are the current lap's.
        lap_BM: `[B, M]` how many laps are complete; with none the slots above are not visible.
        entries: shared by a group, `[B, E, D]`, or each query's own, `[B, M, K, D]`, and which
            of them are visible, `[B, M, E or K]` bool. Only a query's visible ones must be in order.
        sink_H: `[H]` fp32 logit per head, not scaled.

    Returns:
        `[B, M, H, D]` in the dtype of `q_BMHD`; softmax in fp32.

    Source: DeepSeek-V4 inference/kernel.py, sparse_attn.
    """
    heads = q_BMHD.shape[2]
    if heads < _LEAST_ROWS:
        q_BMHD = F.pad(q_BMHD, (0, 0, 0, _LEAST_ROWS - heads))
        sink_H = F.pad(sink_H, (0, _LEAST_ROWS - heads))
    b, m, h, d = q_BMHD.shape
    current, previous = rings
    width = current.shape[1]
    rows = q_BMHD.reshape(b, m * h, d)
    newer = torch.arange(width, device=rows.device) <= slots_BM.unsqueeze(-1)
    z = torch.bmm(rows, current.transpose(1, 2)).view(b, m, h, width)
    if previous is not current:
        older = torch.bmm(rows, previous.transpose(1, 2)).view(b, m, h, width)
        z = torch.where(newer.unsqueeze(2), z, older)
    seen = [newer | (lap_BM > 0).unsqueeze(-1)]
    parts = [z]
    if entries is not None:
        listed, visible = entries
        more = -listed.shape[-2] % _STEP
        listed, visible = F.pad(listed, (0, 0, 0, more)), F.pad(visible, (0, more))
        shared = listed.ndim == 3
        grouped, keys = (rows, listed) if shared else (rows.view(-1, h, d), listed.flatten(0, 1))
        parts.append(torch.bmm(grouped, keys.transpose(1, 2)).view(b, m, h, -1))
        seen.append(visible)
    z = torch.cat(parts, dim=-1).float().mul_(d**-0.5)
    z.masked_fill_(~torch.cat(seen, dim=-1).unsqueeze(2), float("-inf"))
    z = torch.cat([sink_H.view(-1, 1).expand(b, m, h, 1), z], dim=-1)
    p = torch.softmax(z, dim=-1)[..., 1:].to(q_BMHD.dtype)
    ring = p[..., :width]
    fresh = (ring * newer.unsqueeze(2)).view(b, m * h, width)
    out = torch.bmm(fresh, current)
    out = torch.baddbmm(out, ring.reshape(b, m * h, width) - fresh, previous)
    if entries is not None:
        out = out.view(grouped.shape)
        p = p[..., width:].reshape(*grouped.shape[:2], -1)
        for first in range(0, keys.shape[1], _BLOCK):
            block = slice(first, first + _BLOCK)
            out = torch.baddbmm(out, p[..., block], keys[:, block])
    return out.view(b, m, h, d)[:, :, :heads]
