"""Build the image here, without a registry or a container runtime, and run it.

`make test-image`. buildah runs the Dockerfile in a chroot, on a base made by debootstrap (the
default base image's own packages), from wheels downloaded beforehand: the air-gapped way of
docs/image.md. Then whalepod starts in it as its user, and the pods of `make test-netns` run on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "image"
WHEELS = ROOT / "wheels"
BASE, TAG = "localhost/debian-base:bookworm", "localhost/whalepod:test"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
BUILDAH = (
    *("buildah", "--storage-driver", "overlay"),
    *("--root", str(CACHE / "store"), "--runroot", str(CACHE / "run")),
)
APART = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
SMOKE = """
set -eu
test "$(id -u):$(id -g)" = 1000:1000
whalepod --version; ray --version; serve --help > /dev/null
PATH=/usr/local/bin:/usr/bin:/bin ray --version > /dev/null  # as in a login shell
wget --version > /dev/null; echo success | grep -q success   # KubeRay's probes
for absent in cc gcc g++ c++ clang ld make pip; do ! command -v $absent; done
! test -e /source; ! test -e /wheel; ! touch /opt/whalepod/x 2> /dev/null
cd /; python - <<'PY'
import importlib, pathlib, whalepod
assert str(pathlib.Path(whalepod.__file__)).startswith("/opt/whalepod/lib/"), whalepod.__file__
for name in ("cli", "model.whole", "engine.local", "cluster.fabric", "actors.pools",
             "ingress.serve", "protos.inference_pb2_grpc", "kernels.linear"):
    importlib.import_module(f"whalepod.{name}")
PY
whalepod generate --model /models/demo --prompt "The whale" --max-tokens 4
"""


def run(*command: str, **options: object) -> None:
    """Run a command; end with its status when it fails."""
    done = subprocess.run(command, cwd=ROOT, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}: status {done.returncode}")


def said(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def tools() -> None:
    """buildah and debootstrap, installed where apt-get can."""
    if os.geteuid() != 0:
        sys.exit("test-image needs root: buildah's chroot isolation mounts and changes users")
    missing = [tool for tool in ("buildah", "debootstrap") if not which(tool)]
    if missing and not which("apt-get"):
        sys.exit(f"install {' '.join(missing)} first")
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "--yes", "--no-install-recommends", *missing)


def base() -> None:
    """The base image, once: what `debian:12-slim` is made of."""
    if BASE in said(*BUILDAH, "images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    rootfs = CACHE / "rootfs"
    run("rm", "-rf", str(rootfs))
    flags = ("--variant=minbase", "--include=ca-certificates")
    run("debootstrap", *flags, "bookworm", str(rootfs), MIRROR, stdout=subprocess.DEVNULL)
    made = said(*BUILDAH, "from", "scratch")
    run(*BUILDAH, "add", "--quiet", made, str(rootfs), "/", stdout=subprocess.DEVNULL)
    run(*BUILDAH, "commit", "--quiet", "--rm", made, BASE, stdout=subprocess.DEVNULL)
    run("rm", "-rf", str(rootfs))


def wheels() -> None:
    """Every wheel that the image holds, for the base's Python."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*wanted["project"]["dependencies"], *wanted["build-system"]["requires"]]
    index = ("--extra-index-url", TORCH_INDEX) if TORCH_INDEX else ()
    target = ("--python-version", "3.11", "--only-binary", ":all:", "--dest", str(WHEELS))
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    run(*pip, *target, *index, "-c", "constraints.txt", *needed)


def build() -> None:
    """The Dockerfile, without the network's package indexes."""
    arguments = {
        "BASE_IMAGE": BASE,
        "TORCH_INDEX": "",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "/source/wheels",
        "REVISION": said("git", "rev-parse", "HEAD"),
    }
    given = [word for k, v in arguments.items() for word in ("--build-arg", f"{k}={v}")]
    flags = ("--quiet", "--isolation", "chroot", "--format", "docker", "--tag", TAG)
    with (CACHE / "build.log").open("wb") as log:
        run(*BUILDAH, "bud", *flags, *given, ".", stdout=log, stderr=subprocess.STDOUT)


def check(container: str) -> list[str]:
    """Start whalepod in a container; returns the image's environment."""
    shell = (*BUILDAH, "run", "--isolation", "chroot", container, "--", "bash", "-c", SMOKE)
    run(*shell)
    config = json.loads(said(*BUILDAH, "inspect", "--type", "image", TAG))["Docker"]["config"]
    assert config["User"] == "1000:1000", config["User"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    environment: list[str] = config["Env"]
    return environment


def pods(container: str, environment: list[str]) -> None:
    """The chart's pods, on the image's files."""
    root = said(*BUILDAH, "mount", container)
    told = {"WHALEPOD_IMAGE_ROOT": root, "WHALEPOD_IMAGE_ENV": json.dumps(environment)}
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "netns", "-p", "no:cacheprovider")
    run("timeout", "300", *APART, *pytest, env={**os.environ, **told})


def main() -> None:
    """Everything, with times."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for step in (tools, base, wheels, build):
        begun = time.monotonic()
        step()
        print(f"{step.__name__:8} {time.monotonic() - begun:5.0f} s", flush=True)
    container = said(*BUILDAH, "from", TAG)
    try:
        begun = time.monotonic()
        environment = check(container)
        print(f"smoke    {time.monotonic() - begun:5.0f} s", flush=True)
        pods(container, environment)
    finally:
        run(*BUILDAH, "rm", container, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
