"""Measure everything that the model card states; results are merged into a JSON file.

    python -m demo.evaluate --model models/demo --folder .cache/demo --out models/demo/results.json

Takes about 15 minutes on two cores. `--parts recall` measures one part anew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from random import Random

import torch
from bench.machine import describe

from demo.batches import Source
from demo.documents.protocol import BOS
from demo.documents.talk import talk
from demo.evaluation import losses, recall, text
from whalepod.model.checkpoint import Checkpoint
from whalepod.model.whole import WholeModel


class Card:
    """Results so far, on disk after every one."""

    def __init__(self, out: Path) -> None:
        self.out, self.begun = out, time.monotonic()
        self.results: dict[str, object] = json.loads(out.read_text()) if out.exists() else {}
        self.results["machine"] = describe()

    def note(self, key: str, value: object) -> None:
        """Keep and show a result."""
        self.results[key] = value
        shown = json.dumps(value, ensure_ascii=False)
        print(f"{time.monotonic() - self.begun:6.0f} s  {key}: {shown}", flush=True)
        text = json.dumps(self.results, indent=1, ensure_ascii=False)
        self.out.write_text(text + "\n", encoding="utf-8")


def measure_losses(card: Card, args: argparse.Namespace, source: Source, model: WholeModel) -> None:
    """Cross-entropies and expert load."""
    rows = losses.held_out_rows(source, 20 // args.few)
    mixed = [row for some in rows.values() for row in some]
    card.note("loss", {kind: losses.engine_loss(model, some) for kind, some in rows.items()})
    card.note("loss_transformers", losses.library_loss(args.model, mixed))
    card.note("loss_by_format", losses.formats(args.model, args.weights, mixed))
    card.note("expert_load", losses.load_by_layer(args.weights, model.config, mixed))


def measure_text(card: Card, args: argparse.Namespace) -> None:
    """Drafts, calls and samples."""
    writer = text.Writer(args.model)
    prompts = [talk(Random(10**9 + i)).prompt() for i in range(40 // args.few)]
    card.note("drafts_accepted", text.drafts_accepted(writer, prompts))
    card.note("tool_calls", text.tool_calls(writer, 100 // args.few))
    card.note("chat", [text.CHAT, *writer.write([text.CHAT], 60)[0][1:]])
    card.note("thinking", [text.THINKING, *writer.write([text.THINKING], 120)[0][1:]])
    starts = [p if p.startswith("<") else BOS + p for p in text.PROMPTS]
    written = writer.write(starts, 120, 0.7)
    card.note("samples", [[p, *w[1:]] for p, w in zip(text.PROMPTS, written, strict=True)])


def measure_recall(card: Card, args: argparse.Namespace, source: Source, model: WholeModel) -> None:
    """Facts from 200 to 4,000 tokens back, found by the indexer and by chance."""
    found = recall.cases(source, 100 // args.few, 200, 4000)
    card.note("recall", {"documents": len(found), "right": recall.share_right(model, found)})
    some = found[::2]
    with recall.random_choice():
        right = recall.share_right(model, some)
    card.note("recall_random", {"documents": len(some), "right": right})


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"), help="texts, tokenizer")
    parser.add_argument("--weights", type=Path, default=Path(".cache/demo/run/weights"))
    parser.add_argument("--out", type=Path, default=Path("models/demo/results.json"))
    parser.add_argument("--parts", nargs="+", default=["losses", "text", "recall"])
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents")
    args = parser.parse_args()
    args.few = 10 if args.quick else 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    card = Card(args.out)
    with torch.inference_mode():
        source = Source(args.folder, "held_out")
        checkpoint = Checkpoint.open(args.model)
        model = WholeModel(checkpoint.config, checkpoint.everything(), blocks=128)
        if "losses" in args.parts:
            measure_losses(card, args, source, model)
        if "text" in args.parts:
            measure_text(card, args)
        if "recall" in args.parts:
            measure_recall(card, args, source, model)


if __name__ == "__main__":
    main()
