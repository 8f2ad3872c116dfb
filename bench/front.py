"""What the HTTP front costs: the same requests to it and to TorchServe behind it, in turns.

    python -m bench.front model-store
"""

import argparse
import http.client
import json
import random
import time
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]  # comes with torchserve

from server.options import ServerOptions
from server.torchserve import TorchServe

BODY = json.dumps({"text": "12 345"}).encode()
HEADERS = {"Content-Type": "application/json"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.front", description=__doc__)
    parser.add_argument("store", type=Path, help="folder of seq2seq.mar")
    parser.add_argument("--requests", type=int, default=2000, help="of each kind, to each")
    a = parser.parse_args()
    with TorchServe(ServerOptions.on_free_ports(a.store)) as server:
        version = server.described("seq2seq")[0]["modelVersion"]
        card = f"/predictions/seq2seq/{version}/card"
        ports = {"the front": server.url, "TorchServe": server.torchserve_url}
        connections = {
            name: http.client.HTTPConnection(url.removeprefix("http://"))
            for name, url in ports.items()
        }
        haproxy = psutil.Process(server.front.pid)
        for title, method, path, body in (
            ("model card", "GET", card, None),
            ("a translation", "POST", "/predictions/seq2seq", BODY),
        ):
            times: dict[str, list[float]] = {name: [] for name in ports}
            began = sum(haproxy.cpu_times()[:2])
            for _ in range(a.requests):
                for name in random.sample(list(ports), 2):
                    begun = time.perf_counter()
                    connections[name].request(method, path, body, HEADERS)
                    reply = connections[name].getresponse()
                    reply.read()
                    times[name].append(time.perf_counter() - begun)
                    if reply.status != 200:
                        raise SystemExit(f"{name} answered {reply.status}")
            cpu = (sum(haproxy.cpu_times()[:2]) - began) / a.requests
            p50 = {name: 1e3 * median(found) for name, found in times.items()}
            told = ", ".join(f"{name} {value:.3f} ms" for name, value in p50.items())
            more = p50["the front"] - p50["TorchServe"]
            print(f"{title}: p50 {told}, more {more:.3f} ms; HAProxy's CPU {1e3 * cpu:.3f} ms")
        print(f"HAProxy's memory: {haproxy.memory_info().rss / (1 << 20):.0f} MiB")


if __name__ == "__main__":
    main()
