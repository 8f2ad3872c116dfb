"""Our engine with int8 weights: `python -m bench.peers.ours_int8 < job.json`."""

from bench.peers.job import serve
from bench.peers.ours import Ours


class OursInt8(Ours):
    system = "ours int8"
    int8 = True


if __name__ == "__main__":
    serve(OursInt8)
