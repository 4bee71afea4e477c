"""What a container of `netpods` sees: its root folder, volumes, environment and rights."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kuberay


@dataclass(frozen=True)
class Image:
    """What pods run on: a root folder, and the environment that the image sets."""

    root: Path
    environment: dict[str, str]

    @classmethod
    def of_this_machine(cls) -> Image:
        """This machine's files, with the interpreter that runs here."""
        binaries = Path(sys.executable).parent
        environment = {
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/home/whalepod",
            "USER": "whalepod",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if "PYTHONPATH" in os.environ:
            places = os.environ["PYTHONPATH"].split(":")
            environment["PYTHONPATH"] = ":".join(str(Path(p).resolve()) for p in places if p)
        return cls(Path("/"), environment)

    @classmethod
    def from_environment(cls) -> Image:
        """The image that `make test-image` unpacked, else this machine."""
        if "WHALEPOD_IMAGE_ROOT" not in os.environ:
            return cls.of_this_machine()
        environment = dict(e.split("=", 1) for e in json.loads(os.environ["WHALEPOD_IMAGE_ENV"]))
        return cls(Path(os.environ["WHALEPOD_IMAGE_ROOT"]), environment)


@dataclass
class Volumes:
    """What the cluster would supply: secrets, config maps, claims as folders.

    `files` are folders that stand in for what an image has at a path.
    """

    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def environment(
    pod: kuberay.Pod, container: dict[str, Any], image: Image, volumes: Volumes, address: str
) -> dict[str, str]:
    """The variables of a container: the image's, then its own, references resolved."""
    found = dict(image.environment)
    for source in container.get("envFrom", []):
        if "secretRef" in source:
            found |= volumes.secrets[source["secretRef"]["name"]]
        if "configMapRef" in source:
            found |= volumes.config_maps[source["configMapRef"]["name"]]
    for entry in container.get("env", []):
        if "valueFrom" not in entry:
            found[entry["name"]] = expand(str(entry.get("value", "")), found)
        elif (value := _value(pod, entry["valueFrom"], volumes, address)) is not None:
            found[entry["name"]] = value
    return found


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in the place of `$(NAME)`; unknown ones stay, as on Kubernetes."""
    return re.sub(r"\$\((\w+)\)", lambda m: variables.get(m[1], m[0]), text)


def _value(pod: kuberay.Pod, source: dict[str, Any], volumes: Volumes, address: str) -> str | None:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"], address)
    if "resourceFieldRef" in source:
        kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
        return kuberay.whole(pod.ray["resources"][kind][name])
    secret = "secretKeyRef" in source
    told = source["secretKeyRef" if secret else "configMapKeyRef"]
    known = (volumes.secrets if secret else volumes.config_maps).get(told["name"], {})
    if told.get("optional") and told["key"] not in known:
        return None
    return known[told["key"]]


def _field(pod: kuberay.Pod, path: str, address: str) -> str:
    if found := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
        return pod.labels.get(found[1], "")
    known = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "status.podIP": address,
        "status.podIPs": address,
        "spec.nodeName": f"node-of-{pod.name}",
        "spec.serviceAccountName": pod.spec.get("serviceAccountName", "default"),
    }
    return known[path]


def security(pod: kuberay.Pod, container: dict[str, Any]) -> dict[str, Any]:
    """The container's security context over the pod's."""
    return {**pod.spec.get("securityContext", {}), **container.get("securityContext", {})}


def as_user(context: dict[str, Any], container: dict[str, Any], image: Image) -> list[str]:
    """The words before a command that give it the context's user and rights, in its folder.

    The default user is the image's, 1000; root only if the context says so.
    """
    user = str(context.get("runAsUser", 1000))
    group = str(context.get("runAsGroup", user))
    groups = ",".join({group, str(context.get("fsGroup", group))})
    told = ["/usr/bin/setpriv", "--reuid", user, "--regid", group, "--groups", groups]
    if "ALL" in context.get("capabilities", {}).get("drop", []):
        told += ["--inh-caps=-all", "--bounding-set=-all"]
    if context.get("allowPrivilegeEscalation") is False:
        told.append("--no-new-privs")
    folder = container.get("workingDir", image.environment["HOME"])
    return [*told, "/usr/bin/env", "-C", folder]


def layer(image: Image, folder: Path, hosts: str) -> Path:
    """A writable layer over the image, with the files that kubelet puts into it."""
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(parents=True)
    if image.root == Path("/"):
        # What Ray left on this machine is none of a pod's business: hide it (an overlay's whiteout).
        (folder / "upper/tmp").mkdir(mode=0o1777)
        os.mknod(folder / "upper/tmp/ray", stat.S_IFCHR)
    options = f"lowerdir={image.root},upperdir={folder / 'upper'},workdir={folder / 'work'}"
    root = folder / "root"
    command = ["mount", "-t", "overlay", "-o", options, "overlay", str(root)]
    subprocess.run(command, check=True)
    (root / "etc/hosts").write_text(hosts)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("")
    if image.root == Path("/"):
        _open_to_all(root)
        home = root / image.environment["HOME"].lstrip("/")
        home.mkdir(parents=True, exist_ok=True)
        os.chown(home, 1000, 1000)
        for place in (root / "tmp", root / "var/tmp"):
            place.chmod(0o1777)
    return root


def _open_to_all(root: Path) -> None:
    """Let the container's user reach the interpreter and this checkout, in its layer alone."""
    wanted = [sys.prefix, sys.base_prefix, str(Path(__file__).parent)]
    wanted += os.environ.get("PYTHONPATH", "").split(":")
    for place in wanted:
        for parent in (Path(place).resolve(), *Path(place).resolve().parents):
            inside = root / str(parent).lstrip("/")
            mode = inside.stat().st_mode
            if mode & 0o005 != 0o005:
                inside.chmod(mode | 0o005)


def mounts(
    pod: kuberay.Pod, container: dict[str, Any], volumes: Volumes, root: Path, folder: Path
) -> list[tuple[str, str, str]]:
    """(source or `tmpfs`, target, options) of each volume mount; `/dev/shm` first.

    The operator gives memory to `/dev/shm` where the template does not.
    """
    known = {v["name"]: v for v in pod.spec.get("volumes", [])}
    found = []
    targets = {m["mountPath"].rstrip("/") for m in container.get("volumeMounts", [])}
    if "/dev/shm" not in targets:
        size = container.get("resources", {}).get("limits", {}).get("memory", "256Mi")
        found.append(("tmpfs", "/dev/shm", f"size={kuberay.whole(size)}"))
    for target, place in volumes.files.items():
        (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        found.append((str(place), target, "ro"))
    for told in container.get("volumeMounts", []):
        source, options = _source(known[told["name"]], volumes, folder)
        target = told["mountPath"]
        if source != "tmpfs" and "subPath" in told:
            source = str(Path(source) / told["subPath"])
            Path(source).mkdir(parents=True, exist_ok=True)
        if not target.startswith("/dev/"):
            (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        if told.get("readOnly"):
            options = options.replace("rw", "ro")
        found.append((source, target, options))
    return found + _uncovered([target for _, target, _ in found])


def _uncovered(targets: list[str]) -> list[tuple[str, str, str]]:
    """Mounts that bring the interpreter and this checkout back where a volume hides them.

    A checkout may lie in /tmp, and pods have a /tmp of their own.
    """
    found: list[tuple[str, str, str]] = []
    for wanted in (Path(__file__).parent.parent, sys.prefix, sys.base_prefix):
        place = Path(wanted).resolve()
        hidden = any(place.is_relative_to(target) for target in targets)
        if hidden and not any(place.is_relative_to(target) for _, target, _ in found):
            found.append((str(place), str(place), "ro"))
    return found


def _source(volume: dict[str, Any], volumes: Volumes, folder: Path) -> tuple[str, str]:
    place = folder / "volumes" / volume["name"]
    if "persistentVolumeClaim" in volume:
        return str(volumes.claims[volume["persistentVolumeClaim"]["claimName"]]), "rw"
    if "emptyDir" in volume:
        if (volume["emptyDir"] or {}).get("medium") == "Memory":
            size = volume["emptyDir"].get("sizeLimit", "256Mi")
            # Outlives a container, as a pod's volume does, only where it is no memory.
            return "tmpfs", f"rw,size={kuberay.whole(size)}"
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o777)
        return str(place), "rw"
    kind = "secret" if "secret" in volume else "configMap"
    if kind not in volume:
        raise ValueError(f"volume {volume['name']}: no way to supply {sorted(volume)} here")
    name = volume[kind].get("secretName" if kind == "secret" else "name")
    place.mkdir(parents=True, exist_ok=True)
    for key, text in (volumes.secrets if kind == "secret" else volumes.config_maps)[name].items():
        (place / key).write_text(text)
    return str(place), "ro"
