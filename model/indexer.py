"""The indexer of CSA layers: score every compressed entry, keep the best.

Legend: T tokens, H index heads, I index_head_dim, E entries, K selected entries.
Source: DeepSeek-V4 inference/model.py, Indexer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from whalepod.kernels.attend import Listed
from whalepod.kernels.choose import choose_entries
from whalepod.kernels.index_scores import read_keys
from whalepod.kernels.rotary import norm_rotate
from whalepod.kernels.select import select
from whalepod.model.batch import Batch
from whalepod.model.cache import Compressed
from whalepod.model.compressor import Compressor
from whalepod.model.fidelity import Fidelity
from whalepod.model.rope import rotate_
from whalepod.model.shape import ModelConfig

_STEP = 32


class Indexer:
    """Scores `I[t, e] = sum_h g[t, h] * relu(q[t, h] . k[e])` and picks the largest."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Mapping[str, Tensor],
        prefix: str,
        freqs: Tensor,
        dtype: torch.dtype,
        fidelity: Fidelity,
    ) -> None:
        self.config, self.freqs, self.fidelity, self.dtype = config, freqs, fidelity, dtype
        self.topk = config.index_topk
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
        self.wq_b = weights[f"{prefix}.wq_b.weight"]
        self.weights_proj = weights[f"{prefix}.weights_proj.weight"].float()
        self.compressor = Compressor(
            config,
            layer,
            config.index_head_dim,
            weights,
            f"{prefix}.compressor",
            freqs,
            dtype,
            "index" if fidelity.released else "none",
        )

    def query(self, q: Tensor, batch: Batch) -> Tensor:
        """Rotate (and in `released` round) the raw queries `[T, H * I]`; returns `[T, H, I]`."""
        heads = q.unflatten(-1, (self.config.index_n_heads, self.config.index_head_dim))
        return self.fidelity.index(rotate_(heads, batch.turns(self.freqs)))

    def pick(
        self, raw: Tensor, gate_TH: Tensor, turns: Tensor, keys_FI: Tensor, listed: Listed
    ) -> Listed:
        """Choose among the entries that each row sees; `raw` holds unrotated queries `[T, H * I]`."""
        heads = raw.unflatten(-1, (self.config.index_n_heads, self.config.index_head_dim))
        q_THI = norm_rotate(heads, None, turns, -1.0)
        return choose_entries(q_THI, gate_TH * self.scale, keys_FI, listed, self.topk)

    def score(self, q_BMHI: Tensor, gate_BMH: Tensor, keys_BEI: Tensor) -> Tensor:
        """Score entries, `[B, M, E]` fp32; the caller masks what a query may not see."""
        b, m, h, i = q_BMHI.shape
        entries = keys_BEI.shape[1]
        # Short tails of a row would be summed in another order.
        keys_BEI = F.pad(keys_BEI, (0, 0, 0, -entries % _STEP))
        raw = torch.bmm(q_BMHI.reshape(b, m * h, i), keys_BEI.transpose(1, 2)).float().relu_()
        gate = (gate_BMH * self.scale).reshape(b * m, 1, h)
        return torch.bmm(gate, raw.view(b * m, h, -1)).view(b, m, -1)[..., :entries]

    def _keys(self, rows: Tensor, state: Compressed) -> Tensor:
        return read_keys(state.entries, rows).to(self.dtype)

    def pick_decode(
        self, q_THI: Tensor, gate_TH: Tensor, batch: Batch, state: Compressed, ratio: int
    ) -> tuple[Tensor, Tensor]:
        """Choose entries for the decoding rows.

        Returns:
            flat pool rows `[D, K]` and which of them are real, `[D, K]` bool.
        """
        view, n = batch.decode_view(ratio), batch.decoding
        rows, seen = view.entries_DE, view.seen_DE
        if rows.shape[1] <= self.topk:
            return rows, seen
        scores = self.score(
            q_THI[:n].unsqueeze(1), gate_TH[:n].unsqueeze(1), self._keys(rows, state)
        ).squeeze(1)
        best = select(scores.masked_fill_(~seen, float("-inf")), self.topk)
        return rows.gather(1, best), seen.gather(1, best)
