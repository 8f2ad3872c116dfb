"""What a GPU does, in parts that each end within three minutes on an H100.

    python -m bench.gpu check step engine train --out FILE
    python -m bench.gpu serve --out FILE [--store STORE --text test.source]
    python -m bench.gpu report FILE

Measurements are appended to FILE as lines of JSON. What it holds of the same machine and the same
code is not measured again, so a run that was cut off goes on where it was. `report` makes tables,
with what was measured before beside.

- check: whether sentences come out as on the CPU in float32, and alone as in company. With random
  weights tokens are close to one another, so of half precision only a trained model tells the
  truth: `--model model.pt --source-tokenizer source.model --text test.source`.
- step: milliseconds of a recorded step, the choice and the order of beams included, beside its
  floor: the bytes of weights and memory over the bandwidth measured here, or the operations over
  the rate of products measured here, whichever is more; how many kernels it has, and the share of
  the time in which none runs.
- engine: target tokens a second of the whole engine, beside what its steps allow. NVIDIA publishes
  29,646 for GNMT v2 with a beam of 5 on a V100 in fp16.
- serve: TorchServe with a model of the Multi30k recipe's shape: seconds to READY, requests a
  second, latency, answers alone against answers in a crowd.
- train: words a second of an update.

Random weights in the sizes of NVIDIA's GNMT (4 + 4 layers of 1,024, vocabulary 32,000), sources of
25 tokens, exactly 25 target tokens, unless said otherwise. `--device cpu` with small sizes tries a
part out where there is no GPU; its times tell nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu.check import check
from bench.gpu.engine import engine
from bench.gpu.ledger import Ledger, machine_of
from bench.gpu.models import FORMATS, Models
from bench.gpu.report import report
from bench.gpu.serve import serve
from bench.gpu.step import step
from bench.gpu.train import train

Part = Callable[[argparse.Namespace, Models, Ledger], None]
PARTS: dict[str, Part] = {
    "check": check, "step": step, "engine": engine, "serve": serve, "train": train,
}  # fmt: skip


def parsed(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("parts", nargs="+", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), metavar="FILE")
    parser.add_argument(
        "--code", default="", metavar="NAME", help="such as a commit; default: a digest of the code"
    )
    parser.add_argument("--limit", type=float, default=170, metavar="SECONDS", help="of a part")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--size", default="4x1024", metavar="LAYERSxWIDTH")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--check-size", default="2x512", metavar="LAYERSxWIDTH")
    parser.add_argument("--sentences", type=int, default=48, help="of `check`, and in a crowd")
    parser.add_argument("--model", type=Path, help="a trained model.pt for `check`")
    parser.add_argument("--source-tokenizer", type=Path)
    parser.add_argument("--text", type=Path, help="source sentences, one a line")
    parser.add_argument("--store", type=Path, help="folder of seq2seq.mar for `serve`")
    parser.add_argument("--served-rows", type=int, default=512, help="0: as the archive says")
    parser.add_argument(
        "--served-weights", default="float16", choices=["shipped", *FORMATS],
        help="shipped: as the archive says",
    )  # fmt: skip
    parser.add_argument("--served-vocabulary", type=int, default=6000, help="of random weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load of `serve`")
    a = parser.parse_args(given)
    if a.parts[0] == "report":
        if len(a.parts) != 2:
            parser.error("report: one FILE")
        return a
    if unknown := [one for one in a.parts if one not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}, and report")
    if a.model is not None and (a.source_tokenizer is None or a.text is None):
        parser.error("--model needs --source-tokenizer and --text")
    if a.store is not None and a.text is None:
        parser.error("--store needs --text")
    if a.device == "cpu":
        a.served_weights = "shipped"
    a.formats = a.formats or (list(FORMATS) if a.device == "cuda" else ["float32"])
    return a


def main(given: list[str] | None = None) -> None:
    a = parsed(sys.argv[1:] if given is None else given)
    if a.parts[0] == "report":
        print(report(Path(a.parts[1])))
        return
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device; `make setup TORCH=cuda`")
    missing = 0
    with tempfile.TemporaryDirectory(prefix="seq2serve-") as folder:
        models = Models(a, Path(folder))
        machine = machine_of(models.device, a.code)
        for part in a.parts:
            started = time.monotonic()
            ledger = Ledger(a.out, machine, a.limit)
            PARTS[part](a, models, ledger)
            missing += ledger.left + ledger.failed
            print(f"{part}: {time.monotonic() - started:.0f} s; {ledger.failed} failed, "
                  f"{ledger.left} left for another run", file=sys.stderr)  # fmt: skip
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
