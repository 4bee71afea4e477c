"""Keep Ray Serve's replica port off the network.

Ray 2.60 opens an unauthenticated gRPC port per replica on all interfaces (`[::]:0` in
`ray/serve/_private/replica.py`), with no option for the address. Members bind it to the node's own
address instead, which is where Serve's router looks for it, and which is loopback on a local cluster.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.serve._private import replica

log = logging.getLogger(__name__)
_EVERYWHERE = "[::]:0"


def bind_to_own_address() -> None:
    """Take effect for this process; call it in a replica's constructor, before Serve listens."""
    host = str(ray.util.get_node_ip_address())
    original = getattr(replica, "add_port_to_grpc_server", None)
    if original is None:
        log.warning(
            "Ray %s binds replica ports in an unknown way; check with `ss -ltn` that nothing "
            "listens on a public address",
            ray.__version__,
        )
        return

    def add_port(server: Any, address: str) -> int:
        where = f"{host}:0" if address == _EVERYWHERE else address
        return int(original(server, where))

    replica.add_port_to_grpc_server = add_port
