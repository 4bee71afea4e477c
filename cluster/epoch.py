"""An epoch: who takes part, in which role and rank, until the next one. Immutable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from whalepod.cluster.placement import Placement
from whalepod.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Seat:
    """One member's part in an epoch.

    Args:
        name: unique in the cluster.
        rank: its place in the fabric.
        roles: some of `attention`, `router`, `expert`.
        stage, replica: pipeline stage and number of the attention replica (attention members).
        host: address on the data network.
        doorbell: UDP port on `host` that wakes the member; 0 without one.
    """

    name: str
    rank: int
    roles: tuple[str, ...]
    stage: int = 0
    replica: int = 0
    host: str = "127.0.0.1"
    doorbell: int = 0


@dataclass(frozen=True, slots=True)
class Epoch:
    """Everything members must agree on to run steps together.

    `rendezvous` is the (host, port) of the store where the fabric's ranks find each other.
    """

    id: int
    members: tuple[Seat, ...]
    placement: Placement
    router: Literal["own", "attention"]
    config_digest: str
    backend: str = "local"
    rendezvous: tuple[str, int] = ("", 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Member names in rank order."""
        return tuple(m.name for m in self.members)

    @property
    def stages(self) -> int:
        """Pipeline stages of an attention replica."""
        return max(m.stage for m in self.members if "attention" in m.roles) + 1

    @property
    def router_ranks(self) -> list[int]:
        """Ranks that carry the router role."""
        return [m.rank for m in self.members if "router" in m.roles]

    def attention_ranks(self, stage: int) -> list[int]:
        """Ranks of a stage, by replica."""
        found = [m for m in self.members if "attention" in m.roles and m.stage == stage]
        return [m.rank for m in sorted(found, key=lambda m: m.replica)]

    @property
    def lead(self) -> Seat:
        """The attention member that starts every step."""
        return self.members[self.attention_ranks(0)[0]]

    def member(self, name: str) -> Seat:
        """The seat of a member. Raises ConfigError when it has none."""
        for seat in self.members:
            if seat.name == name:
                return seat
        raise ConfigError(
            f"{name} has no seat in epoch {self.id}; members: {', '.join(self.names)}"
        )

    def rank_of(self, name: str) -> int:
        """The rank of a member."""
        return self.member(name).rank

    def admit(self, name: str, digest: str) -> None:
        """Raise ConfigError when a member's configuration is not the epoch's."""
        if digest != self.config_digest:
            raise ConfigError(
                f"{name} runs configuration {digest}, epoch {self.id} runs {self.config_digest}; "
                "start it with the same file"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "id": self.id,
            "members": [asdict(m) for m in self.members],
            "placement": self.placement.to_dict(),
            "router": self.router,
            "config_digest": self.config_digest,
            "backend": self.backend,
            "rendezvous": list(self.rendezvous),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Epoch:
        """Inverse of `to_dict`."""
        host, port = data["rendezvous"]
        members = tuple(Seat(**{**m, "roles": tuple(m["roles"])}) for m in data["members"])
        return cls(
            data["id"],
            members,
            Placement.from_dict(data["placement"]),
            data["router"],
            data["config_digest"],
            data["backend"],
            (host, port),
        )
