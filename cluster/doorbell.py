"""Wake the lead when another attention member gets work: one datagram, no call on the way.

The lead of an idle epoch sleeps between keepalives. A member that receives a request rings it, so
that the request does not wait for the next one. A lost datagram costs at most that wait.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Doorbell:
    """Listens on a UDP port of `host` and calls `wake` for every ring.

    Args:
        host: own address on the data network.
        wake: called from the listener's thread; must not block.
    """

    def __init__(self, host: str, wake: Callable[[], None]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self.port = int(self._socket.getsockname()[1])
        self._wake = wake
        threading.Thread(target=self._listen, name="doorbell", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        # Closing alone does not wake a blocked receive; a datagram to oneself does.
        port, self.port = self.port, 0
        with contextlib.suppress(OSError):
            self._socket.sendto(b"", (self._socket.getsockname()[0], port))
        self._socket.close()

    def _listen(self) -> None:
        while self.port:
            try:
                self._socket.recv(16)
            except OSError:
                return
            self._wake()


class Ringer:
    """Rings one address."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)

    def __call__(self) -> None:
        """Send a ring; errors are ignored, the keepalive makes up for it."""
        # A socket each time (microseconds, once a request): nothing to close when epochs change.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bell,
        ):
            bell.setblocking(False)
            bell.sendto(b"1", self._address)
