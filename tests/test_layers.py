"""The import rule of docs/architecture.md, checked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "whalepod"

# folder -> folders it may import; a folder may always import itself.
MAY_IMPORT = {
    "kernels": set(),
    "protos": set(),
    "cluster": set(),
    "model": {"kernels"},
    "engine": {"kernels", "model", "cluster"},
    "actors": {"model", "cluster", "engine"},
    "ingress": {"protos", "model", "engine", "actors"},
}
VOCABULARY = {"config", "errors", "metrics"}  # src/whalepod/*.py that anyone may import

HOME = {  # third-party package -> where it may be imported
    "ray": ("actors/", "ingress/serve.py"),
    "kubernetes": ("cluster/kube.py", "cluster/kube_transport.py"),
    "urllib3": ("cluster/kube_transport.py",),
    "triton": ("kernels/",),
    "numba": ("kernels/",),
    "llguidance": ("engine/grammar.py", "engine/grammar_rules.py"),
    "llvmlite": ("kernels/",),
    "torch.distributed": ("cluster/rendezvous.py", "cluster/nccl.py"),
    "fastapi": ("ingress/http.py", "ingress/serve.py"),
    "grpc": ("ingress/grpc.py", "protos/"),
    "safetensors": ("model/tiny.py",),
    "tokenizers": ("model/tokenizer.py", "model/tiny_tokenizer.py"),
    "prometheus_client": ("metrics.py",),
    "uvicorn": ("ingress/listener.py",),
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    found = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    assert len(found) > 40, "the links of src/whalepod are broken"
    return sorted(found)


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_point_down(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | VOCABULARY | {folder}
    for path in sorted((ROOT / folder).rglob("*.py")):
        used = {n.split(".")[1] for n in imported(path) if n.startswith("whalepod.")}
        assert used <= allowed | {"__version__"}, (
            f"{path.name}: {folder}/ may not import {sorted(used - allowed)}"
        )


@pytest.mark.parametrize("word", sorted(VOCABULARY))
def test_vocabulary_imports_nothing_of_ours_but_vocabulary(word: str) -> None:
    used = {n.split(".")[1] for n in imported(ROOT / f"{word}.py") if n.startswith("whalepod.")}
    assert used <= VOCABULARY


@pytest.mark.parametrize("package", sorted(HOME))
def test_third_party_names_have_one_home(package: str) -> None:
    for path in sources():
        if any(name == package or name.startswith(f"{package}.") for name in imported(path)):
            place = str(path.relative_to(ROOT))
            assert place.startswith(HOME[package]), f"{place}: {package} belongs in {HOME[package]}"


def test_every_source_folder_is_linked_and_bare_names_stay_free() -> None:
    linked = {p.name for p in ROOT.iterdir() if p.is_symlink()}
    assert linked == set(MAY_IMPORT)
    for name in linked:
        # An __init__.py here would let a checkout on sys.path (Ray adds the
        # driver's directory to every worker) hide the PyPI package `kernels`.
        assert not (ROOT / name / "__init__.py").exists(), name


def test_no_file_grows_past_300_lines() -> None:
    long = {p.name: n for p in sources() if (n := len(p.read_text().splitlines())) > 300}
    assert not {name for name in long if "_pb2" not in name}, long
