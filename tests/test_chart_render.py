"""The chart with both helms: lint, golden renders, notes, packaging, generated files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chart.render import CASES, CHART, HELM3, HELM4, ROOT, Doc, docs, helm, parse, text

pytestmark = pytest.mark.helm
GOLDEN = Path(__file__).parent / "chart" / "golden"


@pytest.mark.parametrize("package", [HELM3, HELM4], ids=lambda p: p.helm)
@pytest.mark.parametrize("case", CASES)
def test_lint_is_strictly_clean(case: str, package) -> None:
    done = helm("lint", "--strict", str(CHART), "-f", str(CASES[case]), package=package)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 12


@pytest.mark.parametrize("case", CASES)
def test_render_equals_the_golden_file(case: str) -> None:
    golden = GOLDEN / f"{case}.yaml"
    # Scripts have tests of their own; here their lines would drown the rest.
    made = "---\n".join(yaml.safe_dump(_without_scripts(d), sort_keys=True) for d in docs(case))
    if os.environ.get("WHALEPOD_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(made)
    assert made == golden.read_text(), "`make helm-golden` writes it anew; read the difference"


def _without_scripts(doc: Doc) -> Doc:
    if doc["kind"] == "ConfigMap":
        for name in list(doc.get("data", {})):
            if name.endswith((".py", ".json")):
                doc["data"][name] = "..."
    return doc


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_both_helms_render_the_same(case: str) -> None:
    assert parse(text(case, HELM3)) == parse(text(case, HELM4))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("laptop", ["serves demo from /models/demo", "experts    1 pod(s), 2 member(s)"]),
        ("flash-8xh100", ["of 7 GPU(s)", "A Job downloads deepseek-ai/DeepSeek-V4-Flash"]),
        ("open", ["networkPolicy.enabled=false"]),
        ("nvlink-affinity", ["needs twice the 12 GPU(s)"]),
        ("autoscaled", ["RayCluster whale-whalepod"]),
    ],
)
def test_notes_say_what_was_made_and_what_to_do(case: str, told: list[str]) -> None:
    values = str(CASES[case])
    done = helm("install", "--dry-run=client", "whale", str(CHART), "-n", "serving", "-f", values)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    for words in [*told, "helm test whale -n serving", "whalepod k8s status whale -n serving"]:
        assert words in notes


def test_the_package_holds_what_renders_need(tmp_path: Path) -> None:
    done = helm("package", str(CHART), "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("whalepod-*.tgz")
    made = helm("template", "whale", str(archive), "-n", "serving", "-f", str(CASES["laptop"]))
    assert parse(made.stdout) == docs("laptop")


def test_schema_and_table_are_current() -> None:
    command = [sys.executable, str(ROOT / "helm" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_schema_is_closed_and_knows_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def walk(values: Doc, part: Doc, where: str) -> None:
        part = schema["$defs"][part["$ref"].split("/")[-1]] if "$ref" in part else part
        assert part.get("description") or "properties" in part, f"{where} is not documented"
        if "properties" in part:
            assert part["additionalProperties"] is False, where
            for key, value in values.items():
                walk(value, part["properties"][key], f"{where}.{key}")

    walk(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


def test_every_value_is_used_by_a_template() -> None:
    templates = "".join(p.read_text() for p in (CHART / "templates").rglob("*") if p.is_file())
    templates += (CHART / "files" / "alerts.yaml").read_text()
    leaves: list[str] = []

    def walk(values: Doc) -> None:
        for key, value in values.items():
            leaves.append(key)
            if isinstance(value, dict):
                walk(value)

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    # Maps that go into objects as they are need not be named key by key.
    whole = ("podSecurityContext", "securityContext", "resources", "rayHealthCheck", "labels")
    walk({k: v for k, v in values.items() if k not in whole})
    skipped = {"requests", "limits", "cpu", "memory", "period_ms", "timeout_ms"}
    skipped |= {"initial_delay_ms", "failure_threshold", "grafana_dashboard"}
    assert [k for k in leaves if k not in templates and k not in skipped] == []
