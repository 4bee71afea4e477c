"""Run helm, once for each set of values."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart.tools import HELM3, HELM4, HOME, Package

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "whalepod"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CASES = {
    p.stem: p for folder in ("examples", "ci") for p in sorted((CHART / folder).glob("*.yaml"))
}
Doc = dict[str, Any]


def helm(*arguments: str, package: Package = HELM4) -> subprocess.CompletedProcess[str]:
    """Run a helm; it sees no configuration but its own."""
    binary = package.folder / "helm"
    if not binary.exists():
        pytest.fail(f"{binary} is missing; `make test-helm` fetches it")
    homes = {f"HELM_{k}_HOME": str(HOME / k.lower()) for k in ("CACHE", "CONFIG", "DATA")}
    command = [str(binary), *arguments]
    env = {**os.environ, **homes, "KUBECONFIG": "/nowhere"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@functools.cache
def text(case: str, package: Package = HELM4, release: str = "whale") -> str:
    """What `helm template` makes of a values file of the chart."""
    done = helm(
        "template", release, str(CHART), "-n", "serving", "-f", str(CASES[case]), package=package
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def parse(made: str) -> list[Doc]:
    """The objects in a rendered text."""
    return [doc for doc in yaml.load_all(made, Loader=LOADER) if doc]


@functools.cache
def _docs(case: str) -> str:
    return json.dumps(parse(text(case)))


def docs(case: str) -> list[Doc]:
    """A values file's objects, fresh ones each time."""
    found: list[Doc] = json.loads(_docs(case))
    return found


def one(found: list[Doc], kind: str, name: str = "") -> Doc:
    """The object of a kind (and with an ending of its name)."""
    match = [d for d in found if d["kind"] == kind and d["metadata"]["name"].endswith(name)]
    assert len(match) == 1, f"{len(match)} objects {kind} *{name}"
    return match[0]


def ray_spec(found: list[Doc]) -> Doc:
    """The RayCluster's spec, of either kind."""
    ray = next(d for d in found if d["kind"] in ("RayService", "RayCluster"))
    spec: Doc = ray["spec"].get("rayClusterConfig", ray["spec"])
    return spec


def groups(spec: Doc) -> dict[str, Doc]:
    """Head and worker groups by name."""
    return {"head": spec["headGroupSpec"], **{g["groupName"]: g for g in spec["workerGroupSpecs"]}}


def serve_config(found: list[Doc]) -> Doc:
    """The Serve configuration, wherever the kind of cluster has it."""
    ray = next(d for d in found if d["kind"] in ("RayService", "RayCluster"))
    if ray["kind"] == "RayService":
        made = ray["spec"]["serveConfigV2"]
    else:
        made = one(found, "ConfigMap", "-scripts")["data"]["serve.yaml"]
    loaded: Doc = yaml.safe_load(made)
    return loaded


__all__ = ["CASES", "CHART", "HELM3", "HELM4", "ROOT", "helm"]
