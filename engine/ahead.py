"""Decode steps that the device is given before the host has taken in the tokens of the last one.

Where one member has every layer and all experts, a step's tokens are drawn on the device that needs them
next. So the next step is planned as if all went on (`foresight`) and launched at once, and the host takes in the
tokens of the last one, and tells others of them, while the device works.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from whalepod.engine.attention import AttentionStage
from whalepod.engine.experts import LocalExperts
from whalepod.engine.foresight import plain
from whalepod.engine.graph import DecodeGraphs, Known
from whalepod.engine.loop import EngineLoop
from whalepod.engine.passes import restore, run_alone, settle
from whalepod.engine.plan import Plan
from whalepod.engine.request import Sampling
from whalepod.engine.sampler import Drawn, Draws, sample


class _Drawn:
    """As `Draws`, done already. On a CPU all draws are `sample`'s, so that log-probabilities keep their bits."""

    def __init__(self, logits_NV: Tensor, settings: Seq[Sampling], positions: Seq[int]) -> None:
        self._drawn = sample(logits_NV, settings, positions)
        tokens = [max(0, d.token) for d in self._drawn]  # the step ahead reads some token
        self.tokens_N = torch.tensor(tokens, device=logits_NV.device)

    def take(self) -> list[Drawn]:
        """What was drawn."""
        return self._drawn


@dataclass(slots=True)
class Flight:
    """A step that the device works on."""

    plan: Plan
    draws: Draws | _Drawn


class Ahead:
    """Steps of one member, each finished while the device works on the next.

    Between two calls of `step` one may be under way: then `plan` is that one's, and no other can be planned.
    """

    def __init__(self, loop: EngineLoop, stage: AttentionStage) -> None:
        self.loop, self.stage = loop, stage
        self._flight: Flight | None = None

    @property
    def plan(self) -> Plan | None:
        """The step that is under way."""
        return None if self._flight is None else self._flight.plan

    def drop(self) -> None:
        """Leave what is under way: its tokens are planned again, and drawn again alike."""
        self._flight = None

    def step(self, experts: LocalExperts, plan: Plan) -> None:
        """Take in the tokens of `plan`: of the step that is under way, or of a new one."""
        flight, self._flight = self._flight, None
        assert flight is None or flight.plan is plan
        flight = flight or self._launch(experts, plan)
        if flight is None:
            self.loop.finish(plan, *run_alone(self.stage, experts, plan))
            return
        following = self.loop.foresee(plan)
        if following is not None:
            known = Known(flight.draws.tokens_N, following.rows)
            self._flight = self._launch(experts, following, known)
            self.loop.counters.foreseen += self._flight is not None
        self.loop.finish(plan, flight.draws.take())

    def _launch(
        self, experts: LocalExperts, plan: Plan, known: Known | None = None
    ) -> Flight | None:
        """Start a step whose draws need nothing of the host; None where it is of another kind."""
        stage, micro_batches = self.stage, plan.step.micro_batches
        if stage.graphs is None or stage.drafter is not None or len(micro_batches) != 1:
            return None
        (micro_batch,) = micro_batches
        if not (DecodeGraphs.takes(micro_batch) and all(map(plain, micro_batch.parts))):
            return None
        restore(stage, plan.step)
        found = stage.graphs.run(micro_batches, experts, known)
        assert found is not None
        ((batch, x_TCD, logits),) = found
        settings, positions = zip(*micro_batch.draws(), strict=True)
        kind = Draws if logits.device.type == "cuda" else _Drawn
        draws = kind(logits, settings, positions)
        settle(stage, plan, [batch], [x_TCD], [])
        return Flight(plan, draws)
