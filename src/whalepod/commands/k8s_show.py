"""How the k8s commands tell what they found, as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from whalepod.cluster.kube_objects import age

if TYPE_CHECKING:
    from whalepod.cluster.kube_preflight import Preflight
    from whalepod.cluster.kube_status import PodState

_HEAD = ("GROUP", "POD", "NODE", "STATE", "READY", "RESTARTS", "AGE", "LAST END", "MEMBERS")


def preflight(found: Preflight) -> str:
    """One line a finding, with the fix below it, and a verdict."""
    lines = []
    for finding in found.findings:
        lines.append(f"{finding.status:7}  {finding.check:10}  {finding.what}")
        if finding.fix:
            lines.append(f"{'':7}  {'':10}  -> {finding.fix}")
    counts = {s: sum(f.status == s for f in found.findings) for s in ("failure", "warning")}
    told = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items())
    verdict = "ready for whalepod" if found.good else "not ready for whalepod"
    lines.append(f"namespace {found.namespace} of {found.server}: {verdict} ({told})")
    return "\n".join(lines)


def ray(found: Sequence[Mapping[str, Any]]) -> str:
    """RayServices and RayClusters: state, what is not as it should be, applications."""
    lines = []
    for state in found:
        facts = []
        if "active" in state:
            facts.append(f"cluster {state['active']}")
        if "pending" in state:
            facts.append(f"cluster {state['pending']} is being prepared")
        if "endpoints" in state:
            facts.append(f"{state['endpoints']} serve endpoints")
        if "workers_wanted" in state:
            facts.append(f"{state.get('workers_ready', 0)}/{state['workers_wanted']} workers ready")
        told = f"{state['kind']} {state['name']}: {state['state']}"
        lines.append(f"{told} ({', '.join(facts)})" if facts else told)
        if state.get("reason"):
            lines.append(f"  {state['reason']}")
        lines += [f"  {line}" for line in _conditions(state["conditions"])]
        for name, application in state.get("applications", {}).items():
            lines += [f"  {line}" for line in _application(name, application)]
    return "\n".join(lines)


def _conditions(conditions: Iterable[Mapping[str, str]]) -> Iterable[str]:
    for c in conditions:
        why = ": ".join(part for part in (c["reason"], " ".join(c["message"].split())) if part)
        yield f"{c['type']}={c['status']}" + (f" {why}" if why else "")


def _application(name: str, application: Mapping[str, Any]) -> Iterable[str]:
    pools = application["deployments"]
    told = ", ".join(f"{pool} {state['status']}" for pool, state in pools.items())
    yield f"application {name}: {application['status']}" + (f" ({told})" if told else "")
    messages = [application["message"], *(p["message"] for p in pools.values())]
    yield from (f"  {line}" for m in messages if m for line in m.strip().splitlines()[-1:])


def epoch(report: Mapping[str, Any] | None, trouble: str | None) -> str:
    """The epoch in a line, or why it is not known."""
    if report is None:
        return f"epoch unknown: {trouble}"
    waiting = report.get("waiting_for") or "members"
    state = "serving" if report["ready"] else f"waiting for {waiting}"
    return f"epoch {report['epoch']}: {state}; fabric {report.get('fabric')}"


def pods(states: Sequence[PodState], lost: Sequence[Mapping[str, Any]]) -> str:
    """A table of pods, then what they wait for, then members that no pod holds."""
    rows = [_HEAD] + [
        (
            *(s.group, s.name, s.node, s.state, s.ready, str(s.restarts), age(s.started)),
            _end(s.last),
            members(s.members),
        )
        for s in states
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for s in states:
        if s.why:
            lines.append(f"{s.name}: {' '.join(s.why.split())}")
        if s.last and s.last["message"]:
            lines.append(f"{s.name} ended: {' '.join(s.last['message'].split())[:300]}")
    lines += [
        f"member {m['name']} on {m['host']} ({m['state']}): no pod of the release has that address"
        for m in lost
    ]
    return "\n".join(lines)


def _end(last: Mapping[str, Any] | None) -> str:
    if last is None:
        return "-"
    return f"{last['reason']} ({last['exit_code']}) {age(last['finished'])} ago"


def members(found: Iterable[Mapping[str, Any]]) -> str:
    """Members of one pod: ranks, roles and state, equal ones together."""
    groups: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for member in found:
        groups["+".join(member["roles"]) or member["pool"], member["state"]].append(
            member.get("rank")
        )
    told = []
    for (roles, state), ranks in groups.items():
        seated = sorted(r for r in ranks if r is not None)
        shown = f"rank {spans(seated)} " if seated else f"{len(ranks)} x "
        told.append(f"{shown}{roles} {state}")
    return "; ".join(told) or "-"


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers as `0-3,5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
