"""NetworkPolicies made true in a pod's own network space, with nftables, as a CNI would.

Peers are found among the pods that run here, by label; whoever else a policy admits (an operator, a
gateway, DNS) is not here. Stands for the semantics of `networking.k8s.io/v1`: a pod that a policy
selects may only do what some policy allows, for each direction that policies name; replies pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DENIED = """set denied {
type ipv4_addr . ipv4_addr . inet_proto . inet_service
size 64
flags dynamic
}"""
_NOTE = "update @denied { ip saddr . ip daddr . meta l4proto . th dport }"


@dataclass(frozen=True)
class Peer:
    """A pod, or something else with labels and an address."""

    address: str
    labels: Mapping[str, str]
    ports: Mapping[str, int]
    namespace: str = "default"


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for wanted in selector.get("matchExpressions", []):
        key, values = wanted["key"], wanted.get("values", [])
        holds = {
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
        }
        if not holds[wanted["operator"]]:
            return False
    return True


def ruleset(policies: list[dict[str, Any]], pod: Peer, others: list[Peer], node: str) -> str:
    """An nftables script for the network space of `pod`; the node at `node` may come in always.

    What is dropped is noted in the set `denied`.
    """
    mine = [p for p in policies if selects(p["spec"]["podSelector"], pod.labels)]
    lines = ["table ip pods", "delete table ip pods", "table ip pods {", _DENIED]
    for direction, hook in (("Ingress", "input"), ("Egress", "output")):
        about = [p for p in mine if direction in p["spec"]["policyTypes"]]
        verdict = "drop" if about else "accept"
        lines.append(f"chain {hook} {{ type filter hook {hook} priority 0; policy {verdict};")
        interface = "iifname" if hook == "input" else "oifname"
        lines += [f'{interface} "lo" accept', "ct state established,related accept"]
        lines += [f"ip saddr {node} accept"] if hook == "input" else []
        lines += [rule for p in about for rule in _rules(p, direction, pod, others)]
        lines += [_NOTE] if about else []
        lines.append("}")
    return "\n".join([*lines, "}"]) + "\n"


def _rules(policy: dict[str, Any], direction: str, pod: Peer, others: list[Peer]) -> list[str]:
    found = []
    for rule in policy["spec"].get(direction.lower()) or []:
        peers = rule.get("from" if direction == "Ingress" else "to")
        near = _near(peers, pod, others)
        if not near:
            continue
        side = "saddr" if direction == "Ingress" else "daddr"
        who = "" if peers is None else f"ip {side} {{ {', '.join(p.address for p in near)} }} "
        for port in rule.get("ports") or [None]:
            targets = [pod] if direction == "Ingress" else near
            found += [f"{who}{match}accept" for match in _matches(port, targets)]
    return found


def _near(peers: list[dict[str, Any]] | None, pod: Peer, others: list[Peer]) -> list[Peer]:
    if peers is None:
        return [*others, pod]
    return [o for o in others if any(_is(peer, pod, o) for peer in peers)]


def _is(peer: dict[str, Any], pod: Peer, other: Peer) -> bool:
    """Whether a rule's peer means `other`. Name spaces have no labels here but their name."""
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        space = {"kubernetes.io/metadata.name": other.namespace}
        if not selects(peer["namespaceSelector"], space):
            return False
    elif other.namespace != pod.namespace:
        return False
    return selects(peer.get("podSelector", {}), other.labels)


def _matches(port: dict[str, Any] | None, targets: list[Peer]) -> list[str]:
    if port is None:
        return [""]
    protocol = port.get("protocol", "TCP").lower()
    if "port" not in port:
        return [f"meta l4proto {protocol} "]
    if isinstance(port["port"], str):
        numbers = sorted({t.ports[port["port"]] for t in targets if port["port"] in t.ports})
        return [f"{protocol} dport {n} " for n in numbers]
    last = port.get("endPort")
    return [f"{protocol} dport {port['port']}{f'-{last}' if last else ''} "]
