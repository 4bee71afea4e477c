"""Hand the Serve configuration to a RayCluster.

    python3 deploy.py serve.yaml http://HEAD:8265

The token comes from RAY_AUTH_TOKEN. Waits for the dashboard; ends once Serve has taken the
configuration, with an error when Serve refuses it.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

import yaml

PATIENCE_S = 900


def put(url, config, token):
    """One try. Raises urllib's errors."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    address = f"{url}/api/serve/applications/"
    request = urllib.request.Request(address, json.dumps(config).encode(), headers, method="PUT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60):
        pass


def main():
    """See the module."""
    path, url = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            put(url, config, os.environ.get("RAY_AUTH_TOKEN"))
            print(f"{url} has taken {path}")
            return
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            if error.code < 500:
                sys.exit(f"{url} refuses {path} with {error.code}: {text}")
            said = f"{error.code} {text}"
        except OSError as error:
            said = str(error)
        if time.monotonic() > deadline:
            sys.exit(f"{url} took nothing for {PATIENCE_S} s: {said}")
        print(f"waiting for {url}: {said}", flush=True)
        time.sleep(float(os.environ.get("RETRY_S", "5")))


if __name__ == "__main__":
    main()
