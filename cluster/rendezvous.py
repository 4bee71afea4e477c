"""Where the ranks of an epoch meet, and how each of them gets its fabric."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable, Sequence

from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from whalepod.cluster.fabric import LANES, Fabric, TorchFabric
from whalepod.cluster.nccl import NcclFabric, open_lanes
from whalepod.errors import ConfigError, EpochLost

# A pulse is waited for as long as an epoch lasts.
_FOR_EVER_S = 10 * 365 * 86400.0
# Longest that communicators may take, on many nodes too.
_NCCL_S = 60.0


class Rendezvous:
    """The store where ranks of an epoch find each other; lives with whoever makes epochs."""

    def __init__(self, host: str) -> None:
        # The store's own listener would take every interface; it accepts one that is bound already.
        listener = socket.create_server((host, 0), backlog=1024)
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.address = (host, port)


def connect(
    epoch: int,
    rank: int,
    names: Sequence[str],
    *,
    address: tuple[str, int],
    backend: str,
    host: str,
    deadline_s: float,
    rendezvous_s: float = 10.0,
) -> Fabric:
    """Meet the other members of an epoch; blocks until all are there.

    Args:
        address: of the `Rendezvous`.
        backend: `gloo` or `nccl`.
        host: own address on the data network.
        deadline_s: longest wait of any later operation.
        rendezvous_s: longest wait for the others here.

    Raises:
        EpochLost: somebody did not come.
        ConfigError: an unknown backend, or NCCL where it cannot run.
    """
    if backend not in ("gloo", "nccl"):
        raise ConfigError(f"fabric {backend!r} is unknown; use gloo or nccl")
    try:
        store = TCPStore(
            address[0], address[1], None, False, timeout=datetime.timedelta(seconds=rendezvous_s)
        )
        keyed = PrefixStore(f"epoch/{epoch}", store)
        group = _gloo(keyed, rank, len(names), host, deadline_s)
        fabric = TorchFabric(group, rank, names, epoch)
        if backend == "gloo":
            return fabric
        stores = [PrefixStore(f"lane/{lane}", keyed) for lane in range(LANES + 1)]
        # Who waits in NCCL for a member that died on its way there waits for ever.
        lanes = _within(_NCCL_S, lambda: open_lanes(stores, rank, len(names)))
        pulse = _gloo(PrefixStore("pulse", keyed), rank, len(names), host, _FOR_EVER_S)
        return NcclFabric(lanes, fabric, pulse, deadline_s)
    except RuntimeError as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EpochLost(epoch, [], f"rendezvous at {address}: {detail[:160]}") from None


def _within(limit_s: float, work: Callable[[], list[object]]) -> list[object]:
    """What `work` returns or raises, in a thread that is left alone after a while. Raises RuntimeError."""
    done: list[list[object] | Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run, name="nccl", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not done:
        raise RuntimeError(f"NCCL's communicators were not there within {limit_s:g} s")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def _gloo(store: PrefixStore, rank: int, size: int, host: str, deadline_s: float) -> object:
    options = ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=deadline_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 2
    return ProcessGroupGloo(store, rank, size, options)
