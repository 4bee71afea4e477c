"""A Ray cluster on this machine for `whalepod up`: a head node of its own, on loopback, with a token.

Its process id, ports and token lie in a state folder, so that later commands find it and `down`
ends exactly what `up` started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from whalepod.errors import WhalepodError

START_S, STOP_S = 90.0, 40.0


class LocalClusterError(WhalepodError):
    """The local Ray cluster did not start or is not there; the message says where to look."""


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running head node.

    `boot` tells a recycled process id from ours.
    """

    pid: int
    boot: str
    dashboard: str
    address: str
    token_path: str
    http: str
    grpc: str


def state_folder() -> Path:
    """Where the state of this user's local cluster lies."""
    base = os.environ.get("WHALEPOD_STATE") or Path.home() / ".local" / "state" / "whalepod"
    return Path(base)


def running() -> LocalCluster | None:
    """The cluster that `up` started, if it still runs."""
    try:
        found = LocalCluster(**json.loads((state_folder() / "cluster.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    return found if _boot(found.pid) == found.boot else None


def use_token(cluster: LocalCluster) -> str:
    """Make this process speak to the cluster with its token; returns the token."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = cluster.token_path
    return Path(cluster.token_path).read_text().strip()


def start(http: str, grpc: str, dashboard_port: int = 0) -> LocalCluster:
    """Start a head node on 127.0.0.1 and wait until its dashboard answers.

    Args:
        http, grpc: the addresses to be served later, kept for other commands.
        dashboard_port: 0 chooses a free one.

    Raises:
        LocalClusterError: one runs already, or Ray did not come up; names the log.
    """
    if (found := running()) is not None:
        raise LocalClusterError(
            f"a cluster is already running (pid {found.pid}, {found.http}); `whalepod down` ends it"
        )
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    token_path = folder / "auth_token"
    with open(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    port, dashboard = _free_port(), dashboard_port or _free_port()
    log = folder / "ray.log"
    # Ray's session folder holds Unix sockets, whose paths must be short.
    session = Path("/tmp") / f"whalepod-{os.getuid()}-{port}"
    command = [
        *(str(_ray()), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={dashboard}", f"--temp-dir={session}"),
        *(f"--num-cpus={max(8, os.cpu_count() or 1)}", "--object-store-memory=100000000"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, **_environment(token_path)},
        )
    cluster = LocalCluster(
        process.pid,
        _boot(process.pid) or "",
        f"http://127.0.0.1:{dashboard}",
        f"127.0.0.1:{port}",
        str(token_path),
        http,
        grpc,
    )
    (folder / "cluster.json").write_text(json.dumps(asdict(cluster)))
    _await_dashboard(cluster, process, log)
    return cluster


def stop(cluster: LocalCluster) -> None:
    """End the head node and all its processes; forgets the cluster."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(cluster.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while _boot(cluster.pid) == cluster.boot and time.monotonic() < end:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(cluster.pid, signal.SIGKILL)
    port = cluster.address.rsplit(":", 1)[1]
    shutil.rmtree(Path("/tmp") / f"whalepod-{os.getuid()}-{port}", ignore_errors=True)
    (state_folder() / "cluster.json").unlink(missing_ok=True)


def _environment(token_path: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Makes Ray's own servers bind to loopback instead of the interface's address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # `down` means now; draining is for nodes whose work another node can take over.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        # The ingress and the members only pass things on; a thread hop per call costs more.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _ray() -> Path:
    """The `ray` command that belongs to this interpreter."""
    beside = Path(sys.executable).with_name("ray")
    if not beside.exists():
        raise LocalClusterError(f"there is no {beside}; install whalepod with its dependencies")
    return beside


def _await_dashboard(cluster: LocalCluster, process: subprocess.Popen[bytes], log: Path) -> None:
    host, port = cluster.dashboard.removeprefix("http://").split(":")
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            tail = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise LocalClusterError(f"Ray ended at start: {' / '.join(tail)} (log: {log})")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.1)
    stop(cluster)
    raise LocalClusterError(f"Ray's dashboard did not answer within {START_S:.0f} s (log: {log})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _boot(pid: int) -> str | None:
    """Start time of a process in clock ticks, or None when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return None if fields[0] == "Z" else fields[19]
