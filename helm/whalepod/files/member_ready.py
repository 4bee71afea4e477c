"""Readiness of a member's pod: exit 0 while its members serve in an epoch.

python3 member_ready.py http://INGRESS/status     (POD_IP in the environment)

Only the standard library: this runs every few seconds beside the members.
"""

import json
import os
import sys
import urllib.request


def state(report, address):
    """Why the pod at this address is not ready; empty when it is."""
    mine = [member for member in report["members"] if member["host"] == address]
    if not mine:
        return f"no member of {address} has joined"
    idle = [f"{member['name']} is {member['state']}" for member in mine if member["state"] != "serving"]
    return "; ".join(idle)


def main():
    """Ask, tell, exit."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(sys.argv[1], timeout=8) as reply:
            why = state(json.load(reply), os.environ["POD_IP"])
    except (OSError, ValueError, KeyError) as error:
        why = f"{sys.argv[1]} does not tell: {error!r}"
    if why:
        sys.exit(why)


if __name__ == "__main__":
    main()
