"""Ray Serve's choice of an attention replica: known prefixes first, then the shorter queue."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from whalepod.engine.affinity import Affinity, chain
from whalepod.engine.request import Request


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request where its prompt is known, unless that replica is busier than others.

    Set as `request_router_class` of the attention deployment; the keyword arguments are those of
    `Affinity`, and `block_tokens`.
    """

    def initialize_state(self, *, capacity: int, busy: int, block_tokens: int) -> None:
        """Serve calls this with `request_router_kwargs`."""
        self._affinity, self._block_tokens = Affinity(capacity, busy), block_tokens

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas to try: the one that knows the prompt, then two by chance."""
        by_name = {r.replica_id.unique_id: r for r in candidate_replicas}
        few = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        ranks = [few] if few else []
        request = _request(pending_request)
        if pending_request is None or request is None:
            return ranks
        # Ask again at once the first time, then with pauses.
        pending_request.routing_context.should_backoff = True
        known = self.replica_queue_len_cache
        loads = {name: known.get(r.replica_id) or 0 for name, r in by_name.items()}
        chosen = self._affinity.choose(chain(request, self._block_tokens), loads)
        return [[by_name[chosen]], *ranks] if chosen else ranks

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember where a prompt went."""
        request = _request(pending_request)
        if request is not None:
            self._affinity.record(chain(request, self._block_tokens), replica_id.unique_id)


def _request(pending: PendingRequest | None) -> Request | None:
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, Request) else None
