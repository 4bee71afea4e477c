"""Write `values.schema.json` and the table of the chart's README from the comments in values.yaml.

A value's comment is `# -- text`, its bounds are `# @schema {...}` (draft 2020-12, merged over the type
of the default); `# @merge pods` lets a map also have the keys of `pods`.

    python helm/generate.py            writes both files
    python helm/generate.py --check    exits with 1 when one is not current
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "whalepod"
BEGIN, END = "<!-- values: generated -->", "<!-- end of values -->"
_KEY = re.compile(r"^( *)([\w.-]+):(.*)$")
_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


@dataclass
class Value:
    """A key of values.yaml with its comment."""

    default: Any
    text: str
    bounds: dict[str, Any]
    merge: str
    children: dict[str, Value] = field(default_factory=dict)


def read(text: str) -> dict[str, Value]:
    """All keys, nested. Raises SystemExit for a value without a comment."""
    root: dict[str, Value] = {}
    stack: list[tuple[int, dict[str, Value], Any]] = [(-1, root, yaml.safe_load(text))]
    comments: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comments.append(stripped[1:].strip())
            continue
        match = _KEY.match(line)
        if match:
            indent = len(match[1])
            while stack[-1][0] >= indent:
                stack.pop()
            value = _value(stack[-1][2][match[2]], comments, match[2])
            stack[-1][1][match[2]] = value
            stack.append((indent, value.children, value.default))
        comments = []
    return root


def _value(default: Any, comments: list[str], key: str) -> Value:
    text, bounds, merge = "", {}, ""
    for comment in comments:
        if comment.startswith("@schema "):
            bounds = yaml.safe_load(comment.removeprefix("@schema "))
        elif comment.startswith("@merge "):
            merge = comment.removeprefix("@merge ")
        elif comment.startswith("-- "):
            text = comment.removeprefix("-- ")
        elif text:
            text += " " + comment
    if not text and not merge and not (isinstance(default, dict) and default):
        raise SystemExit(f"values.yaml: {key} has no `# --` comment")
    return Value(default, text, bounds, merge)


def schema(values: dict[str, Value]) -> dict[str, Any]:
    """The closed schema of a map."""
    found = {}
    for key, value in values.items():
        if value.children or value.merge:
            found[key] = schema(value.children)
            if value.merge:
                pods = {name: {"$ref": f"#/$defs/{name}"} for name in _PODS}
                found[key]["properties"] = {**pods, **found[key]["properties"]}
        else:
            found[key] = _leaf(value)
    return {"type": "object", "additionalProperties": False, "properties": found}


_PODS: list[str] = []


def _leaf(value: Value) -> dict[str, Any]:
    leaf: dict[str, Any] = {"description": value.text}
    if value.default is not None and "enum" not in value.bounds:
        leaf["type"] = _TYPES[type(value.default)]
    return {**leaf, **value.bounds}


def whole_schema(values: dict[str, Value]) -> str:
    """The text of values.schema.json."""
    _PODS[:] = values["pods"].children
    made = schema(values)
    made["properties"]["global"] = {"type": "object"}  # Helm's own, of parent charts
    defs = made["properties"]["pods"]["properties"]
    made["properties"]["pods"]["properties"] = {n: {"$ref": f"#/$defs/{n}"} for n in _PODS}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "whalepod"}
    return json.dumps({**head, **made, "$defs": defs}, indent=1) + "\n"


def table(values: dict[str, Value], path: str = "") -> list[str]:
    """Rows of the README's table."""
    rows = []
    for key, value in values.items():
        where = f"{path}{key}"
        if value.children:
            rows += table(value.children, f"{where}.")
            if value.merge:
                rows.append(f"| `{where}.*` | | every key of `{value.merge}`, for these pods |")
        elif value.merge:
            rows.append(f"| `{where}.*` | | every key of `{value.merge}`, for these pods |")
        else:
            default = json.dumps(value.default) if value.default != "" else '""'
            text = value.text.replace("|", "\\|")
            rows.append(f"| `{where}` | `{default}` | {text} |")
    return rows


def readme(old: str, values: dict[str, Value]) -> str:
    """The README with its table made anew."""
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    rows = ["| value | default | meaning |", "|---|---|---|", *table(values)]
    return "\n".join([f"{before}{BEGIN}", *rows, f"{END}{after}"])


def main() -> None:
    """See the module."""
    values = read((CHART / "values.yaml").read_text(encoding="utf-8"))
    page = CHART / "README.md"
    wanted = {
        CHART / "values.schema.json": whole_schema(values),
        page: readme(page.read_text(encoding="utf-8"), values),
    }
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    if "--check" in sys.argv:
        if stale:
            raise SystemExit(f"not current: {', '.join(p.name for p in stale)}; run {__file__}")
        return
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
