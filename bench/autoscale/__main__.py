"""Simulate, print the table of docs/results.md, draw."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from bench.autoscale.cluster import Run, Setup, simulate
from bench.autoscale.hpa import SYNC
from bench.autoscale.pod import measured
from bench.autoscale.traces import scalers, traces

GOOD = 0.202  # s, the p99 of docs/results.md, Under load
LEAP = 4  # pods that bear the step: 1,800 / 463, rounded up
SLOW = 180.0  # s more until a pod serves: a node (120) and its image (60); assumed, not measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscale", description=__doc__)
    known = {one.name: one for one in traces()}
    parser.add_argument("--traces", nargs="+", choices=known, default=list(known))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=float, default=Setup.start, help="s until a pod serves")
    parser.add_argument("--out", type=Path, help="folder of the pictures; needs matplotlib")
    arguments = parser.parse_args()
    setup = Setup(measured(), start=arguments.start, seed=arguments.seed)
    ours, *others = scalers()
    print(f"`{' '.join(['python -m bench.autoscale', *sys.argv[1:]])}`\n")
    print("| trace | autoscaler | pods, mean / most | p50 / p99 ms | refused | s with p99 > "
          f"{1000 * GOOD:.0f} ms |")
    print("|---|---|---|---|---|---|")
    for name in arguments.traces:
        runs = []
        for scaler in (ours, *others):
            runs.append(simulate(setup, known[name], scaler))
            print(row(runs[-1]), flush=True)
        if name == "step":
            ready = dataclasses.replace(known[name], replicas=LEAP)
            name_of_many = f"this project, {LEAP} pods or more"
            many = dataclasses.replace(ours, minimum=LEAP, name=name_of_many)
            print(row(simulate(setup, ready, many)), flush=True)
            late = dataclasses.replace(setup, start=setup.start + SLOW)
            slow = dataclasses.replace(ours, name=f"this project, {late.start:g} s to serve")
            print(row(simulate(late, known[name], slow)), flush=True)
        if arguments.out is not None:
            from bench.autoscale.figures import draw

            (wanted,) = (one.value for one in ours.targets if one.name == "arrivals")
            for theme, content in draw(runs, wanted, GOOD).files.items():
                arguments.out.mkdir(parents=True, exist_ok=True)
                ending = ".png" if theme == "light" else f".{theme}.png"
                (arguments.out / f"{name}{ending}").write_bytes(content)


def row(run: Run) -> str:
    late = SYNC * sum(one.p99 > GOOD for one in run.windows)
    most = max(one.replicas for one in run.windows)
    share = run.refused / max(run.arrived, 1)
    return (
        f"| {run.trace.name} | {run.scaler} | {run.pods:.1f} / {most} "
        f"| {1000 * run.percentile(50):.0f} / {1000 * run.percentile(99):.0f} "
        f"| {f'{run.refused:,} ({100 * share:.2g} %)' if run.refused else '0'} | {late:,.0f} |"
    )


if __name__ == "__main__":
    main()
