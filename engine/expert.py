"""An expert shard: the weights of its (layer, expert) pairs, and the loop that serves rows.

Legend: M rows, N (row, expert) pairs, K experts per token, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from whalepod.cluster.fabric import Fabric
from whalepod.cluster.placement import Placement
from whalepod.engine.lanes import Announcement, Lanes
from whalepod.engine.legs import (
    TAG_HOME,
    TAG_SHARD,
    Form,
    Place,
    to_home,
    to_shard,
)
from whalepod.engine.mail import Letter, Mail
from whalepod.kernels.fp4 import Fp4Stack
from whalepod.model.expert import Expert
from whalepod.model.moe import run_experts
from whalepod.model.shape import ModelConfig
from whalepod.model.stack import ExpertStack

# A layer's experts, and one as it is read for them.
Held = dict[int, Expert] | ExpertStack
Loaded = Expert | tuple[Fp4Stack, Fp4Stack]


class ExpertShard:
    """Hold experts across epochs; load what a placement adds, drop what it takes away.

    Args:
        config: sizes.
        load: reads one expert, `(layer, expert)`, in the form that a layer's table takes.
        dtype: of the rows that travel.
        table: makes the empty table of a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        load: Callable[[int, int], Loaded],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        table: Callable[[], Held] = dict,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self._load, self._table = load, table
        self.experts: dict[int, Held] = {}
        k, width = config.num_experts_per_tok, config.hidden_size
        self._in, self._out = to_shard(width, dtype, k), to_home(width, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return sum(held_bytes(layer) for layer in self.experts.values())

    def prepare(self, placement: Placement, name: str, layers: range) -> int:
        """Load the experts that `placement` gives to member `name`; returns how many were new."""
        new = 0
        for layer in layers:
            held = self.experts.setdefault(layer, self._table())
            wanted = [e for e in placement.experts_of(name, layer) if e not in held]
            fill(held, wanted, lambda expert, layer=layer: self._load(layer, expert))  # type: ignore[misc]
            new += len(wanted)
        return new

    def trim(self, placement: Placement, name: str, layers: range) -> None:
        """Drop what `placement` does not give to `name` (after the epoch has begun)."""
        for layer in layers:
            keep = set(placement.experts_of(name, layer))
            held = self.experts.get(layer, {})
            for expert in [e for e in held if e not in keep]:
                del held[expert]

    def serve_step(self, fabric: Fabric, lanes: Lanes, announced: dict[int, Announcement]) -> None:
        """Serve every pass of one step, as a member of its own."""
        mail = Mail(fabric, self.device)
        passes = list(lanes.passes(announced))
        asked = self.ask(mail, lanes, *passes[0]) if passes else []
        for i, (place, rows) in enumerate(passes):
            current = asked
            if i + 1 < len(passes):
                asked = self.ask(mail, lanes, *passes[i + 1])
            self.serve_pass(mail, lanes, place, rows, current)
            mail.post(TAG_HOME, place)
        mail.settle()

    def ask(self, mail: Mail, lanes: Lanes, place: Place, rows: list[int]) -> list[Letter]:
        """Ask every dispatcher that has rows in this pass for its message."""
        return [
            mail.ask(TAG_SHARD, place, rank, self._in.bytes_of(count))
            for rank, count in lanes.load_of(place.layer, rows).items()
        ]

    def serve_pass(
        self, mail: Mail, lanes: Lanes, place: Place, rows: list[int], asked: list[Letter]
    ) -> None:
        """Run the rows of one (layer, micro-batch) and hand the results in; legs 2 to 3."""
        parcels = [self._in.unpack(place, letter.take()) for letter in asked]
        mail.check()
        if not parcels:
            return
        ints_MC = torch.cat([ints for ints, _ in parcels])
        x_MD = torch.cat([x for _, x in parcels])
        homes = lanes.homes[lanes.stage_of(place.layer)]
        counts = {home: count for home, count in zip(homes, rows, strict=True) if count}
        self._reply(mail, place, *self._run(place.layer, ints_MC, x_MD), counts)

    def _run(self, layer: int, ints_MC: Tensor, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Run every (row, expert) pair: labels (home, row, choice) `[N, 3]` and outputs `[N, D]`."""
        k = self.config.num_experts_per_tok
        experts_MK, bits_MK = ints_MC[:, 2 : 2 + k], ints_MC[:, 2 + k :].contiguous()
        at, choice = (experts_MK >= 0).nonzero(as_tuple=True)
        weights_N = bits_MK.view(torch.float32)[at, choice]
        experts = experts_MK[at, choice].tolist()
        labels = torch.cat([ints_MC[at, :2], choice.to(torch.int32).unsqueeze(1)], dim=1)
        if not experts:
            return labels, x_MD[:0]
        return labels, run_experts(x_MD[at], experts, weights_N, self.experts[layer])

    def _reply(
        self,
        mail: Mail,
        place: Place,
        labels_N3: Tensor,
        out_ND: Tensor,
        counts: dict[int, int],
    ) -> None:
        for home, count in counts.items():
            mine = slice(None) if len(counts) == 1 else (labels_N3[:, 0] == home)
            message = self._out.pack(place, labels_N3[mine, 1:], out_ND[mine])
            mail.send(TAG_HOME, place, message, home, home_room(self._out, count, self.config))


def fill(held: Held, wanted: Seq[int], load: Callable[[int], Loaded]) -> None:
    """Read experts into a layer's table; a stack makes room for all of them at once."""
    for i, expert in enumerate(wanted):
        one = load(expert)
        if isinstance(held, ExpertStack):
            assert isinstance(one, tuple)
            held.reserve(len(wanted) - i, one)
            held[expert] = one
        else:
            assert isinstance(one, Expert)
            held[expert] = one


def held_bytes(held: Held) -> int:
    """Bytes of the weights in a layer's table."""
    if isinstance(held, ExpertStack):
        return held.nbytes
    return sum(expert.nbytes for expert in held.values())


def home_room(form: Form, rows: int, config: ModelConfig) -> int:
    """Largest message a shard may send home for that many rows: each of a row's choices."""
    return form.bytes_of(rows * config.num_experts_per_tok)
