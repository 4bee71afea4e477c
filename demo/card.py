"""Write the model card from what was measured.

    python -m demo.card --model models/demo --run .cache/demo/run

Reads `results.json` of the model (`demo.evaluate`) and `log.jsonl` of the run (`demo.train`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from demo.model import demo_config
from demo.net.parameters import counts
from whalepod.model.shape import ModelConfig

TEMPLATE = Path(__file__).parent / "card.md"


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def _training(lines: list[dict[str, Any]]) -> str:
    head = (
        "step",
        "tokens (M)",
        "literature",
        "short documents",
        "recall",
        "answers right",
        "index KL",
    )
    keys = ("text", "short", "recall", "answers", "index")
    picked = [line for i, line in enumerate(lines) if i % 3 == 0 or i == len(lines) - 1]
    rows = [(x["step"], round(x["tokens"] / 1e6), *(x[k] for k in keys)) for x in picked]
    return _table(head, rows)


def _measured(r: dict[str, Any]) -> str:
    loss, by = r["loss"], r["loss_by_format"]
    ours = by["quantised"]
    rows: list[tuple[object, ...]] = [
        ("cross-entropy, generated documents / literature (nats/token)", f"{loss['short']:.3f} / {loss['text']:.2f}"),
        ("all held-out rows: our engine / transformers", f"{ours:.5f} / {r['loss_transformers']:.5f} (difference {abs(ours - r['loss_transformers']):.1e})"),
        ("unquantised / FP4+FP8 / with the release's activation roundings", f"{by['unquantised']:.4f} / {by['quantised']:.4f} / {by['released']:.4f}"),
        ("first MTP draft accepted greedily, conversations", f"{r['drafts_accepted']:.1%}"),
        ("expert load max/mean by layer, MTP last", ", ".join(map(str, r["expert_load"]))),
        ("held-out tool requests: well-formed call / the right call", f"{r['tool_calls']['well_formed']} / {r['tool_calls']['right']} of {r['tool_calls']['prompts']}"),
        ("fact 200 to 4,000 tokens back repeated", f"{r['recall']['right']:.0%} of {r['recall']['documents']} documents"),
        ("the same with random entries in place of the indexer's choice", f"{r['recall_random']['right']:.0%} of {r['recall_random']['documents']}"),
    ]  # fmt: skip
    return _table(("what", "measured"), rows)


def _samples(r: dict[str, Any]) -> str:
    told = [r["chat"], r["thinking"], *r["samples"]]
    return "\n\n".join(
        f"**`{prompt}`** ({'to its end' if finish == 'stop' else 'cut at the limit'})\n\n"
        + "\n".join(f"> {line}" for line in text.strip().splitlines())
        for prompt, text, finish in told
    )


def main() -> None:
    """Fill the template."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--run", type=Path, default=Path(".cache/demo/run"))
    args = parser.parse_args()
    results = json.loads((args.model / "results.json").read_text())
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    sizes = counts(ModelConfig.from_dict(demo_config()))
    fields = {
        "total": f"{sizes['total'] / 1e6:.1f}M",
        "experts": f"{sizes['experts'] / 1e6:.1f}M",
        "active": f"{sizes['active'] / 1e6:.1f}M",
        "tokens": f"{log[-1]['tokens'] / 1e6:.0f}M",
        "training": _training(log),
        "measured": _measured(results),
        "samples": _samples(results),
        "machine": ", ".join(f"{k} {v}" for k, v in results["machine"].items()),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for key, value in fields.items():
        text = text.replace("{" + key + "}", value)
    (args.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
