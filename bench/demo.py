"""`make demo`: start a local cluster, ask it once over HTTP and once over gRPC, say how to go on."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import grpc
import httpx

from whalepod.config import Config
from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

CONFIG = "configs/tiny.yaml"


def ask_http(config: Config) -> str:
    """Complete a prompt over HTTP."""
    url = f"http://{config.server.host}:{config.server.http_port}/v1/completions"
    body = {"prompt": "The whale", "max_tokens": 16, "temperature": 0}
    reply = httpx.post(url, json=body, timeout=60, trust_env=False)
    return str(reply.raise_for_status().json()["choices"][0]["text"])


def ask_grpc(config: Config) -> str:
    """Complete the same prompt over gRPC."""
    with grpc.insecure_channel(f"{config.server.host}:{config.server.grpc_port}") as channel:
        stub = pb_grpc.InferenceStub(channel)
        sampling = pb.Sampling(max_tokens=16, temperature=0)
        return str(
            stub.Complete(pb.CompleteRequest(text="The whale", sampling=sampling), timeout=60).text
        )


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the cluster after the answers")
    options = parser.parse_args()
    whalepod = [sys.executable, "-m", "whalepod"]
    config = Config.from_file(Path(CONFIG))
    print("starting a local Ray cluster: 1 attention, 1 router, 2 expert members ...", flush=True)
    if subprocess.run([*whalepod, "up", CONFIG]).returncode:
        sys.exit(1)
    try:
        print(f"\nHTTP  The whale -> {ask_http(config)!r}")
        print(f"gRPC  The whale -> {ask_grpc(config)!r}")
        print("(the model is random: the words mean nothing, but both answers are the same)\n")
        subprocess.run([*whalepod, "status"], check=True)
    finally:
        if options.once:
            subprocess.run([*whalepod, "down"], check=True)
    if not options.once:
        bin_ = Path(sys.executable).parent
        print(f"\nIt stays up. Go on with {bin_}/whalepod scale experts=3, then {bin_}/whalepod")
        print(f"status, or kill a member and watch. {bin_}/whalepod down stops it.")


if __name__ == "__main__":
    main()
