"""Readiness of a member's pod: exit 0 while its members serve in an epoch.

    python3 member_ready.py http://INGRESS:PORT/status     (POD_IP in the environment)

Every ingress behind the name is asked until one knows a member of this pod: during an upgrade there
may be ingresses of two clusters. Only the standard library: this runs every few seconds.
"""

import http.client
import json
import os
import random
import socket
import sys
import urllib.parse


def state(report, address):
    """Why the pod at this address is not ready; empty when it is, None when nobody knows it."""
    mine = [member for member in report["members"] if member["host"] == address]
    if not mine:
        return None
    idle = [f"{one['name']} is {one['state']}" for one in mine if one["state"] != "serving"]
    return "; ".join(idle)


def fetch(address, port, path):
    """One ingress' report."""
    connection = http.client.HTTPConnection(address, port, timeout=3)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        if reply.status != 200:
            raise ValueError(f"status {reply.status}")
        return json.load(reply)
    finally:
        connection.close()


def judge(url, own):
    """Why the pod is not ready; empty when it is."""
    place = urllib.parse.urlsplit(url)
    found = socket.getaddrinfo(place.hostname, place.port, type=socket.SOCK_STREAM)
    addresses = sorted({info[4][0] for info in found})
    random.shuffle(addresses)
    said = f"no member of {own} has joined"
    for address in addresses:
        try:
            why = state(fetch(address, place.port, place.path), own)
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            said = f"{address} does not tell: {error!r}"
            continue
        if why is not None:
            return why
    return said


def main():
    """See the module."""
    try:
        why = judge(sys.argv[1], os.environ["POD_IP"])
    except OSError as error:
        why = f"{sys.argv[1]} has no address: {error}"
    if why:
        sys.exit(why)


if __name__ == "__main__":
    main()
