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

CONFIG = "configs/demo.yaml"
QUESTION = "Tell me a story about a whale."


def ask_http(config: Config) -> str:
    """Ask over HTTP."""
    url = f"http://{config.server.host}:{config.server.http_port}/v1/chat/completions"
    messages = [{"role": "user", "content": QUESTION}]
    body = {"messages": messages, "max_tokens": 120, "temperature": 0}
    reply = httpx.post(url, json=body, timeout=60, trust_env=False)
    return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])


def ask_grpc(config: Config) -> str:
    """Ask the same over gRPC."""
    with grpc.insecure_channel(f"{config.server.host}:{config.server.grpc_port}") as channel:
        request = pb.ChatRequest(
            messages=[pb.Message(role=pb.ROLE_USER, content=QUESTION)],
            sampling=pb.Sampling(max_tokens=120, temperature=0),
        )
        return str(pb_grpc.InferenceStub(channel).Chat(request, timeout=60).content)


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
        answers = ask_http(config), ask_grpc(config)
        print(f"\nyou   {QUESTION}\nHTTP  {answers[0]}\ngRPC  {answers[1]}")
        print("(greedy, so the answers are the same)\n")
        if answers[0] != answers[1]:
            sys.exit("the answers differ: greedy decoding must give the same over both")
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
