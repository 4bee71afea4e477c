"""Bring a checkpoint to a volume, whole and checked, and go on where an earlier run stopped.

    download_model.py --hub huggingface|modelscope --repository OWNER/NAME --revision REV \
        [--endpoint URL] [--parallel N] FOLDER
    download_model.py --verify FOLDER      a checkpoint that is there already
    download_model.py --wait FOLDER        until a download into that folder is complete

A file gets its name once its checksum is right (sha256, or git's for small files of Hugging Face);
before that it is FILE.part. FOLDER gets `.whalepod-complete` at the end, after every tensor was
looked at by `whalepod inspect`. The hub's token comes from HUB_TOKEN. Only the standard library.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

MARK = ".whalepod-complete"
CHUNK = 8 << 20
TRIES = 5
ENDPOINTS = {"huggingface": "https://huggingface.co", "modelscope": "https://modelscope.cn"}


class Wrong(Exception):
    """A file or an answer that is not what it should be."""


def open_url(url, offset=0):
    """The response; from `offset` on when the server can."""
    request = urllib.request.Request(url, headers={"User-Agent": "whalepod"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    if os.environ.get("HUB_TOKEN"):  # not passed on to the store that a hub redirects to
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HUB_TOKEN']}")
    return urllib.request.urlopen(request, timeout=60)


def list_huggingface(endpoint, repository, revision):
    """(path, size, kind of checksum, checksum, address) of every file."""
    revision = urllib.parse.quote(revision, safe="")
    url = f"{endpoint}/api/models/{repository}/tree/{revision}?recursive=true"
    while url:
        with open_url(url) as reply:
            entries, links = json.load(reply), reply.headers.get("Link", "")
        for entry in entries:
            if entry["type"] == "file":
                kind, value = "git", entry["oid"]
                if entry.get("lfs"):
                    kind, value = "sha256", entry["lfs"]["oid"]
                place = f"{endpoint}/{repository}/resolve/{revision}/{urllib.parse.quote(entry['path'])}"
                yield entry["path"], entry["size"], kind, value, place
        following = re.search(r'<([^>]+)>;\s*rel="next"', links)
        url = urllib.parse.urljoin(url, following[1]) if following else None


def list_modelscope(endpoint, repository, revision):
    """(path, size, kind of checksum, checksum, address) of every file."""
    base = f"{endpoint}/api/v1/models/{repository}/repo"
    query = urllib.parse.urlencode({"Revision": revision, "Recursive": "true"})
    with open_url(f"{base}/files?{query}") as reply:
        answer = json.load(reply)
    for entry in (answer.get("Data") or {}).get("Files") or []:
        if entry["Type"] != "tree":
            query = urllib.parse.urlencode({"Revision": revision, "FilePath": entry["Path"]})
            yield entry["Path"], entry["Size"], "sha256", entry["Sha256"], f"{base}?{query}"


def checksum(path, kind):
    """sha256 of a file, or git's name of it."""
    digest = hashlib.sha256()
    if kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def fetch(folder, entry):
    """One file, unless it is there. Raises Wrong or OSError."""
    name, size, kind, value, url = entry
    target = folder / name
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        with open_url(url, have) as reply, part.open("ab" if reply.status == 206 else "wb") as file:
            shutil.copyfileobj(reply, file, CHUNK)
    have = part.stat().st_size if part.exists() else part.touch() or 0
    if have < size:
        raise Wrong(f"{name}: the connection ended at {have} of {size} bytes")
    found = checksum(part, kind)
    if found != value:
        part.unlink()
        raise Wrong(f"{name}: checksum {found}, but the hub says {value}; begun again")
    part.rename(target)
    print(f"{name}: {size} bytes, {kind} right", flush=True)


def fetch_surely(folder, entry):
    """One file, with a few tries."""
    for left in reversed(range(TRIES)):
        try:
            return fetch(folder, entry)
        except (Wrong, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404):
                raise SystemExit(f"{entry[4]} answers {error.code}; is the token right?") from None
            if not left:
                raise SystemExit(f"{entry[0]}: {error} ({TRIES} tries)") from None
            print(f"{entry[0]}: {error}; again", flush=True)
            time.sleep(float(os.environ.get("RETRY_S", "5")))


def safe(folder, name):
    """Whether a file of the hub stays in the folder."""
    return folder.resolve() in (folder / name).resolve().parents


def download(options):
    """Everything into the folder, then the mark."""
    folder, mark = options.folder, options.folder / MARK
    wanted = {"repository": options.repository, "revision": options.revision}
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        print(f"{folder} is complete")
        return
    endpoint = (options.endpoint or ENDPOINTS[options.hub]).rstrip("/")
    listing = list_huggingface if options.hub == "huggingface" else list_modelscope
    try:
        entries = list(listing(endpoint, options.repository, options.revision))
    except urllib.error.HTTPError as error:
        raise SystemExit(
            f"{error.url} answers {error.code}; check model.repository, model.revision and the token"
        ) from None
    if not entries or not all(safe(folder, entry[0]) for entry in entries):
        raise SystemExit(f"{options.repository} at {options.revision} lists no usable files")
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(entry[1] for entry in entries if not (folder / entry[0]).exists())
    begun = sum(path.stat().st_size for path in folder.rglob("*.part"))
    free = shutil.disk_usage(folder).free
    if missing - begun > free:
        raise SystemExit(
            f"{missing - begun} bytes are missing, {free} are free; raise model.volume.size"
        )
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda entry: fetch_surely(folder, entry), sorted(entries)))
    inspect(folder)
    mark.write_text(json.dumps(wanted))
    print(f"{folder} is complete: {len(entries)} files")


def verify(folder):
    """SHA256SUMS where there is one, then every tensor."""
    sums = folder / "SHA256SUMS"
    for line in sums.read_text().splitlines() if sums.exists() else []:
        value, _, name = line.partition(" ")
        found = checksum(folder / name.strip().lstrip("*"), "sha256")
        if found != value:
            raise SystemExit(f"{name.strip()}: sha256 {found}, but SHA256SUMS says {value}")
        print(f"{name.strip()}: right", flush=True)
    inspect(folder)


def inspect(folder):
    """Have whalepod look at every tensor. Raises SystemExit."""
    command = [sys.executable, "-m", "whalepod", "inspect", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{folder} is no checkpoint that whalepod can serve (see above)")


def wait(folder):
    """Until the mark is there."""
    said = 0.0
    while not (folder / MARK).exists():
        if time.monotonic() - said > 60:
            print(f"waiting for the download into {folder}", flush=True)
            said = time.monotonic()
        time.sleep(2)


def main():
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hub", choices=list(ENDPOINTS))
    parser.add_argument("--repository")
    parser.add_argument("--revision")
    parser.add_argument("--endpoint")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args()
    if options.wait:
        wait(options.folder)
    elif options.verify:
        verify(options.folder)
    else:
        download(options)


if __name__ == "__main__":
    main()
