"""One step on an attention stage: run it, and make visible what rests on right guesses.

Legend: T rows, C residual streams, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from whalepod.engine.attention import AttentionStage
from whalepod.engine.experts import Experts, LocalExperts
from whalepod.engine.fixed_passes import FixedExperts
from whalepod.engine.outcome import draw_from, outcome
from whalepod.engine.plan import Plan
from whalepod.engine.prompt import PromptLogprobs
from whalepod.engine.sampler import Drawn
from whalepod.engine.step import Part, Step
from whalepod.model.batch import Batch


def run_alone(
    stage: AttentionStage, experts: Experts, plan: Plan
) -> tuple[list[Drawn], dict[int, list[int]], list[PromptLogprobs]]:
    """Run a step on a member that has every layer and reaches experts without other replicas.

    Returns:
        what was drawn, drafts by slot, and what is told of prompts.
    """
    micro_batches = plan.step.micro_batches
    restore(stage, plan.step)
    if (found := run_captured(stage, experts, plan)) is not None:
        return found
    batches = [m.batch(stage.cache.block_tokens, stage.device) for m in micro_batches]
    x = stage.forward(batches, [stage.embed(b) for b in batches], experts)
    drawn, told = outcome(stage, x, micro_batches)
    return drawn, settle(stage, plan, batches, x, drawn), told


def run_captured(
    stage: AttentionStage, experts: Experts, plan: Plan
) -> tuple[list[Drawn], dict[int, list[int]], list[PromptLogprobs]] | None:
    """Run a step as a graph, if it is one of single tokens and everything is on one device."""
    if stage.graphs is None or not isinstance(experts, LocalExperts):
        return None
    found = stage.graphs.run(plan.step.micro_batches, experts)
    return None if found is None else _finish(stage, plan, found)


def run_fixed(
    stage: AttentionStage, experts: FixedExperts, plan: Plan | None, step: int
) -> tuple[list[Drawn], dict[int, list[int]], list[PromptLogprobs]]:
    """Run a step of fixed sizes with other members; `plan` is None when only they have rows.

    Raises:
        EpochLost: some member did not do its part. Nothing has become visible.
        Crowded: likewise; the step has to be run again with more room.
    """
    assert stage.graphs is not None
    own = plan.step.micro_batches if plan is not None else ()
    if plan is not None:
        restore(stage, plan.step)
    experts.legs.begin(step)
    padded = [*own, *[None] * (len(experts.sizes.rows) - len(own))]
    found = stage.graphs.run(padded, experts)
    assert found is not None
    if plan is None:
        return [], {}, []
    return _finish(stage, plan, found, experts)


def _finish(
    stage: AttentionStage,
    plan: Plan,
    found: Seq[tuple[Batch, Tensor, Tensor]],
    experts: FixedExperts | None = None,
) -> tuple[list[Drawn], dict[int, list[int]], list[PromptLogprobs]]:
    drawn: list[Drawn] = []
    for (_, _, logits), micro_batch in zip(found, plan.step.micro_batches, strict=True):
        drawn += draw_from(stage, logits, micro_batch)
    if experts is not None:
        experts.legs.check()
    batches, x = [f[0] for f in found], [f[1] for f in found]
    # What draws after one token has no prompt left to tell of.
    return drawn, settle(stage, plan, batches, x, drawn), []


def restore(stage: AttentionStage, step: Step) -> None:
    """Start slots from the snapshots that their sequences go on from."""
    for part in (p for m in step.micro_batches for p in m.parts if p.restore >= 0):
        stage.cache.copy_slot(part.restore, part.slot)


def settle(
    stage: AttentionStage, plan: Plan, batches: Seq[Batch], x: Seq[Tensor], drawn: list[Drawn]
) -> dict[int, list[int]]:
    """Make a pass's state visible as far as its guesses were right; returns drafts by slot."""
    if stage.drafter is None:  # nothing is a guess
        for micro_batch, batch in zip(plan.step.micro_batches, batches, strict=False):
            for part in micro_batch.parts:
                if part.keep:
                    keep(stage, batch, part, len(part.ids))
            batch.commit()
        return {}
    rest = iter(drawn)
    drafts: dict[int, list[int]] = {}
    for micro_batch, batch, x_TCD in zip(plan.step.micro_batches, batches, x, strict=False):
        emitted: dict[int, list[int]] = {}
        for part in micro_batch.parts:
            if part.draw is not None:
                # A draw that failed (-1) ends its request; drafting after it needs some token.
                got = [max(0, next(rest).token) for _ in range(1 + part.drafts)]
                emitted[part.slot] = part.emitted(got)
            wrong = 1 + part.drafts - len(emitted[part.slot]) if part.drafts else 0
            right = len(part.ids) - wrong
            keep(stage, batch, part, right)
            batch.commit(part.slot, right)
        if plan.drafts:
            drafts |= stage.drafter.propose(micro_batch, x_TCD, emitted, plan.drafts)
    return drafts


def keep(stage: AttentionStage, batch: Batch, part: Part, right: int) -> None:
    """Take the snapshots that a part asks for, of its first `right` rows; before its commit."""
    for rows, snapshot in part.keep:
        if rows <= right:
            stage.cache.copy_slot(part.slot, snapshot)
            batch.keep(part.slot, rows, snapshot)
