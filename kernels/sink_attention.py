"""Multi-query attention over one shared key/value vector per entry, with a sink in the denominator.

Legend: B sequences, M queries per sequence, H heads, S entries, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.registry import Kernel

# Entries are padded to whole blocks, and the weighted sum runs block by block: a matrix product
# splits its inner dimension by its length, which would make a token's bits depend on its company.
_BLOCK = 160


@Kernel
def sink_attention(q_BMHD: Tensor, kv_BSD: Tensor, visible_BMS: Tensor, sink_H: Tensor) -> Tensor:
    """Attend: `p_s = exp(z_s) / (sum exp(z) + exp(sink))`, `o = sum p_s kv_s`, `z = q kv / sqrt(D)`.

    Args:
        q_BMHD: `[B, M, H, D]`, fp32 or bf16.
        kv_BSD: `[B, S, D]`, the same dtype; key and value are the same vector.
        visible_BMS: `[B, M, S]` bool; a query may see no entry at all (then the output is 0).
        sink_H: `[H]` fp32 logit per head, not scaled.

    Returns:
        `[B, M, H, D]` in the dtype of `q_BMHD`; softmax in fp32.

    Source: DeepSeek-V4 inference/kernel.py, sparse_attn.
    """
    b, m, h, d = q_BMHD.shape
    # The sink is an entry of value 0, and it comes first: with the padding at the end, every real
    # entry keeps its place in the sums however many others a batch makes room for.
    extra = -(kv_BSD.shape[1] + 1) % _BLOCK
    kv = F.pad(kv_BSD, (0, 0, 1, extra))
    seen = F.pad(visible_BMS, (1, extra))
    z = torch.bmm(q_BMHD.reshape(b, m * h, d), kv.transpose(1, 2)).view(b, m, h, -1)
    z = (z.float() * d**-0.5).masked_fill_(~seen.unsqueeze(2), float("-inf"))
    z[..., 0] = sink_H
    p = torch.softmax(z, dim=-1).to(kv.dtype).view(b, m * h, -1)
    out = torch.bmm(p[..., :_BLOCK], kv[:, :_BLOCK])
    for first in range(_BLOCK, kv.shape[1], _BLOCK):
        block = slice(first, first + _BLOCK)
        out = torch.baddbmm(out, p[..., block], kv[:, block])
    return out.view(b, m, h, d)
