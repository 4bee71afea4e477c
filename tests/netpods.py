"""Pods without Kubernetes: each in network, process, mount, IPC and host name spaces of its own.

A sandbox holds a pod's network, as kubelet's pause container does; containers run in it one after the
other, over a writable layer of their own on a root folder (an unpacked image, or this machine), as
the user and with the rights that their security context asks for. Everything hangs on this process:
when it ends, the kernel ends the pods.

Needs root in a private network space; `make test-netns` makes one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import kuberay
import netfiles
from netfiles import Image, Volumes
from netpolicy import Peer

NETWORK = "10.77.0"
# This process speaks from several addresses, one for each part it plays; the first by default.
CLIENT, NODE, OPERATOR, STRANGER = (f"{NETWORK}.{n}" for n in (254, 253, 252, 251))
_RUN = """
set -e
exec 0</dev/null
m=/bin/mount
$m -t proc proc "$1/proc"
$m --rbind /dev "$1/dev"
$m --rbind -o ro /sys "$1/sys"
while IFS=$'\\t' read -r source target options; do
    [ -e "$1$target" ] || /bin/mkdir -p "$1$target"
    case $source in
    tmpfs) $m -t tmpfs -o "mode=1777,$options" tmpfs "$1$target" ;;
    *) $m --bind "$source" "$1$target"; $m -o "remount,bind,$options" "$1$target" ;;
    esac
done < "$2"
[ "$3" = rw ] || $m -o remount,ro "$1"
shift 3
exec /usr/sbin/chroot "$@"
"""


def client(address: str = CLIENT, limit_s: float = 30) -> httpx.Client:
    """HTTP from one of this process's addresses."""
    return httpx.Client(
        transport=httpx.HTTPTransport(local_address=address), timeout=limit_s, trust_env=False
    )


def problem() -> str:
    """What this machine lacks for such pods; empty when nothing."""
    missing = [tool for tool in ("ip", "nft", "unshare", "nsenter", "setpriv") if not which(tool)]
    if missing:
        return f"there is no {' '.join(missing)} (Debian: iproute2, nftables, util-linux)"
    if os.geteuid() != 0:
        return "only root can make network spaces"
    script = (
        "ip link add br0 type bridge && nft add table ip t && ip link add v0 type veth peer name v1"
    )
    layers = "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/m && mount -t overlay o -o "
    layers += "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/m"
    spaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*spaces, "sh", "-c", f"{script} && {layers}"], capture_output=True, text=True
    )
    return done.stderr.strip() and f"this kernel refuses: {done.stderr.strip()}"


def private_network() -> bool:
    """Whether this process is root in a network space with nothing but an unused loopback."""
    told = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    return os.geteuid() == 0 and re.findall(r"^\d+: (\w+)", told, re.M) == ["lo"]


class Network:
    """One switch with an address for this process; pods plug into it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pods-"))
        _do("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(self.folder))
        _do("ip", "link", "set", "lo", "up")
        # With an address of its own; else it takes a port's, and another one when that port goes.
        _do("ip", "link", "add", "br0", "address", "02:00:00:00:00:01", "type", "bridge")
        _do("ip", "link", "set", "br0", "up")
        for address in (CLIENT, NODE, OPERATOR, STRANGER):
            _do("ip", "address", "add", f"{address}/24", "dev", "br0")
        # With forwarding on, addresses outside are refused at once instead of after a time-out.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        self.names: dict[str, str] = {}
        self._next = 1

    def address(self) -> str:
        """An address that nobody has had yet."""
        self._next += 1
        return f"{NETWORK}.{self._next - 1}"

    def close(self) -> None:
        """Take the switch and the pods' files away."""
        _do("ip", "link", "delete", "br0")
        _do("umount", "--lazy", "--recursive", str(self.folder))
        self.folder.rmdir()


class Sandbox:
    """A pod that runs: its network, its files, and at most one container at a time.

    Args:
        pod: as the operator made it.
    """

    def __init__(self, network: Network, image: Image, volumes: Volumes, pod: kuberay.Pod) -> None:
        self.network, self.image, self.volumes, self.pod = network, image, volumes, pod
        self.address = network.address()
        self.folder = network.folder / pod.name
        self.folder.mkdir()
        self._pause = subprocess.Popen(
            ["unshare", "--net", "--ipc", "--uts", "--kill-child", "sleep", "infinity"],
            stderr=subprocess.DEVNULL,
        )
        self._main: subprocess.Popen[bytes] | None = None
        self._plug()

    def _plug(self) -> None:
        port = "p" + self.address.rsplit(".", 1)[1]
        inside = ["nsenter", "-t", str(self._pause.pid), "--net", "--uts"]
        own = os.stat("/proc/self/ns/net").st_ino
        while os.stat(f"/proc/{self._pause.pid}/ns/net").st_ino == own:
            time.sleep(0.01)
        pid = str(self._pause.pid)
        _do("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        _do("ip", "link", "set", port, "master", "br0", "up")
        _do(*inside, "ip", "link", "set", "lo", "up")
        _do(*inside, "ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        _do(*inside, "ip", "link", "set", "eth0", "up")
        _do(*inside, "ip", "route", "add", "default", "via", CLIENT)
        _do(*inside, "hostname", self.pod.name)
        self._port = port

    @property
    def peer(self) -> Peer:
        """The pod as network policies see it."""
        ports = {p["name"]: p["containerPort"] for p in self.pod.ray.get("ports", [])}
        return Peer(self.address, self.pod.labels, ports, self.pod.namespace)

    def init(self, limit_s: float = 90) -> None:
        """Run the init containers to their end."""
        for container in self.pod.spec.get("initContainers", []):
            process = self._run(container)
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                status = -1
            assert status == 0, f"{self.pod.name}/{container['name']}: {status}\n{self.log()}"

    def start(self) -> None:
        """Run the Ray container."""
        self._main = self._run(self.pod.ray)

    def log(self, lines: int = 40) -> str:
        """What the containers wrote."""
        logs = sorted(self.folder.glob("*.log"))
        texts = (f"-- {p.name}\n{p.read_text(errors='replace')}" for p in logs)
        return "\n".join("\n".join(t.splitlines()[-lines:]) for t in texts)

    def execute(self, *command: str, limit_s: float = 20) -> subprocess.CompletedProcess[str]:
        """Run a command in the Ray container, as an exec probe does."""
        assert self._main is not None
        spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run(
            ["nsenter", "-t", str(self._first()), *spaces, *self._user(self.pod.ray), *command],
            env=self._environment(self.pod.ray),
            capture_output=True,
            text=True,
            timeout=limit_s,
        )

    def ready(self) -> str:
        """Ask the readiness probe; empty when it says yes, else what it said."""
        probe = self.pod.ray["readinessProbe"]
        if "exec" in probe:
            done = self.execute(*probe["exec"]["command"])
            return "" if done.returncode == 0 else (done.stdout + done.stderr or "status 1")
        get = probe["httpGet"]
        ports = {p.get("name"): p["containerPort"] for p in self.pod.ray.get("ports", [])}
        url = f"http://{self.address}:{ports.get(get['port'], get['port'])}{get.get('path', '/')}"
        try:
            with client(NODE, limit_s=probe.get("timeoutSeconds", 1) + 4) as node:
                reply = node.get(url)
        except httpx.HTTPError as error:
            return f"{url}: {error!r}"
        return "" if 200 <= reply.status_code < 400 else f"{url}: {reply.status_code} {reply.text}"

    def obey(self, policies: str) -> None:
        """Let an nftables script rule the pod's network."""
        inside = ["nsenter", "-t", str(self._pause.pid), "--net", "nft", "-f", "-"]
        done = subprocess.run(inside, input=policies, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{policies}"

    def denied(self) -> list[str]:
        """What the policies held back: source, destination, protocol and port each."""
        inside = ["nsenter", "-t", str(self._pause.pid), "--net"]
        listing = ["nft", "-j", "list", "set", "ip", "pods", "denied"]
        done = subprocess.run([*inside, *listing], capture_output=True, text=True, check=True)
        found = next(e["set"] for e in json.loads(done.stdout)["nftables"] if "set" in e)
        return [" ".join(map(str, e["concat"])) for e in found.get("elem", [])]

    def terminate(self, grace_s: float) -> float | None:
        """End the Ray container as kubelet does; returns the seconds it took, None if killed."""
        assert self._main is not None
        begun = time.monotonic()
        os.kill(self._first(), signal.SIGTERM)
        try:
            self._main.wait(grace_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()
        return time.monotonic() - begun

    def cut_off(self) -> None:
        """Pull the cable: nobody hears of this pod again, not even that it is gone."""
        _do("ip", "link", "set", self._port, "down")

    def kill(self) -> None:
        """End all processes of the pod at once, and its network."""
        for process in (self._main, self._pause):
            if process is not None and process.poll() is None:
                # The death of process 1 ends all others of its space. Changing the user undid
                # unshare's order to die with the parent, so the parent's end alone is not enough.
                for child in _children(process.pid):
                    os.kill(child, signal.SIGKILL)
                process.kill()
                process.wait()

    def _first(self) -> int:
        """The container's process 1, by our count."""
        assert self._main is not None
        return _children(self._main.pid)[0]

    def _run(self, container: dict[str, Any]) -> subprocess.Popen[bytes]:
        root = netfiles.layer(self.image, self.folder / container["name"], self._hosts())
        mounts = netfiles.mounts(self.pod, container, self.volumes, root, self.folder)
        context = netfiles.security(self.pod, container)
        mode = "ro" if context.get("readOnlyRootFilesystem") else "rw"
        command = [*container.get("command", []), *container.get("args", [])]
        variables = self._environment(container)
        line = [netfiles.expand(word, variables) for word in command]
        enter = ["nsenter", "-t", str(self._pause.pid), "--net", "--ipc", "--uts"]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        table = self.folder / f"{container['name']}.mounts"
        table.write_text("".join("\t".join(m) + "\n" for m in mounts))
        inside = ["/bin/bash", "-c", _RUN, "run", str(root), str(table), mode, str(root)]
        with (self.folder / f"{container['name']}.log").open("ab") as log:
            return subprocess.Popen(
                [*enter, *apart, *inside, *self._user(container), *line],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _user(self, container: dict[str, Any]) -> list[str]:
        return netfiles.as_user(netfiles.security(self.pod, container), container, self.image)

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        return netfiles.environment(self.pod, container, self.image, self.volumes, self.address)

    def _hosts(self) -> str:
        known = {"localhost": "127.0.0.1", self.pod.name: self.address, **self.network.names}
        return "".join(f"{address} {name}\n" for name, address in known.items())


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


if __name__ == "__main__":  # `make test-netns` asks whether it can run
    sys.exit(problem() or 0)
