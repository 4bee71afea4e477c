"""Ask a deployment over HTTP and gRPC.

python3 smoke.py http://HOST:8000 HOST:9000 TIMEOUT_S
"""

import json
import sys
import time
import urllib.error
import urllib.request

import grpc

from whalepod.protos import inference_pb2 as pb
from whalepod.protos import inference_pb2_grpc as pb_grpc

PROMPT, TOKENS = "The whale", 8
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url, body=None, timeout=120):
    """GET, or POST of a JSON body; the answer's text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=timeout) as reply:
        return reply.read().decode()


def wait(url, limit_s):
    """Until requests are served. Raises SystemExit with the reason."""
    deadline, said = time.monotonic() + limit_s, "nothing"
    while time.monotonic() < deadline:
        try:
            call(f"{url}/ready", timeout=10)
            return
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
        except OSError as error:
            said = str(error)
        time.sleep(2)
    raise SystemExit(f"{url} is not ready after {limit_s:.0f} s: {said}")


def over_http(url):
    """One whole answer and one stream; the model's name."""
    model = json.loads(call(f"{url}/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = json.loads(call(f"{url}/v1/completions", body))
    if not whole["usage"]["completion_tokens"]:
        raise SystemExit(f"HTTP answered without tokens: {whole}")
    print(f"HTTP    {model}: {whole['choices'][0]['text']!r}")
    lines = call(f"{url}/v1/completions", {**body, "stream": True}).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if events[-1] != "[DONE]" or any("error" in json.loads(event) for event in events[:-1]):
        raise SystemExit(f"HTTP's stream broke: {events[-2:]}")
    print(f"stream  {len(events) - 1} events")
    return model


def over_grpc(address, model):
    """One answer."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        served = [m.id for m in stub.ListModels(pb.ListModelsRequest(), timeout=60).models]
        if model not in served:
            raise SystemExit(f"gRPC serves {served}; HTTP serves {model}")
        request = pb.CompleteRequest(
            model=model, text=PROMPT, sampling=pb.Sampling(max_tokens=TOKENS)
        )
        answer = stub.Complete(request, timeout=120)
    if not answer.usage.completion_tokens:
        raise SystemExit(f"gRPC answered without tokens: {answer}")
    print(f"gRPC    {answer.text!r}")


def main():
    """See the module."""
    http, address, limit_s = sys.argv[1:]
    wait(http, float(limit_s))
    over_grpc(address, over_http(http))


if __name__ == "__main__":
    main()
