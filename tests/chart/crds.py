"""Check custom resources as the API server does: fill in defaults, then validate closed schemas."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import yaml
from chart.render import LOADER
from jsonschema import Draft202012Validator

HERE = Path(__file__).parent / "crds"
Schema = dict[str, Any]


def close(schema: Schema) -> Schema:
    """The same schema without Kubernetes' extensions, refusing unknown keys."""
    dropped = ("default", "nullable")
    out = {
        k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k not in dropped
    }
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    if "properties" in schema:
        out["properties"] = {name: close(sub) for name, sub in schema["properties"].items()}
        keep = schema.get("x-kubernetes-preserve-unknown-fields")
        if "additionalProperties" not in schema and not keep:
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = close(schema[key])
    return out


def default(schema: Schema, value: Any) -> None:
    """Fill in defaults and drop nulls, in place."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, sub in known.items():
            if name in value and value[name] is None and not sub.get("nullable"):
                del value[name]
            if name not in value and "default" in sub:
                value[name] = copy.deepcopy(sub["default"])
            if name in value:
                default(sub, value[name])
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            for name in value.keys() - known.keys():
                default(extra, value[name])
    elif isinstance(value, list):
        for item in value:
            default(schema.get("items", {}), item)


@functools.cache
def ray(kind: str) -> tuple[Schema, Draft202012Validator]:
    """KubeRay's schema of `RayService` or `RayCluster`, and a validator of it."""
    definition = yaml.load((HERE / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=LOADER)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return _validator(version["schema"]["openAPIV3Schema"])


@functools.cache
def other(kind: str) -> tuple[Schema, Draft202012Validator]:
    """The fields that the chart uses of another operator's kind."""
    return _validator(yaml.safe_load((HERE / "others.yaml").read_text())[kind])


def _validator(raw: Schema) -> tuple[Schema, Draft202012Validator]:
    closed = close(raw)
    closed["properties"]["metadata"] = {"type": "object"}
    return raw, Draft202012Validator(closed)


def errors(doc: dict[str, Any]) -> list[str]:
    """What the API server would say."""
    found = ray if doc["apiVersion"] == "ray.io/v1" else other
    raw, validator = found(doc["kind"])
    whole = copy.deepcopy(doc)
    default(raw, whole)
    return [f"{e.json_path}: {e.message[:200]}" for e in validator.iter_errors(whole)]
