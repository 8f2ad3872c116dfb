"""Tables of what a file of measurements holds, beside what was measured before."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.gpu import before
from bench.gpu.check import rows_of
from bench.gpu.ledger import Record, read


def report(path: Path) -> str:
    """Markdown."""
    records = [one for one in read(path) if "value" in one]
    machines = list(dict.fromkeys(told(one["machine"]) for one in records))
    lines = [*machines, f"Before: {before.WHEN}.", ""]
    for part, table in (("check", check), ("step", step), ("engine", engine), ("serve", serve),
                        ("train", train)):  # fmt: skip
        rows = list(table(of_part(records, part), of_part(records, "step")))
        if len(rows) > 1:
            lines += [f"### {part}", "", row(rows[0]), "|---" * len(rows[0]) + "|"]
            lines += [*map(row, rows[1:]), ""]
    failures = [one for one in read(path) if "error" in one]
    done = {str(one["key"]) for one in records}
    lines += [f"- failed: {one['key']}: {one['error']}" for one in failures
              if str(one["key"]) not in done]  # fmt: skip
    return "\n".join(lines)


def of_part(records: list[Record], part: str) -> list[Record]:
    """Key and value of each in one; of two with the same key the later."""
    found: dict[str, Record] = {}
    for one in records:
        if one["key"]["part"] == part:
            found[str(one["key"])] = {**one["key"], **one["value"]}
    return list(found.values())


def told(machine: dict[str, str]) -> str:
    return (
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']} "
        f"(CUDA {machine['cuda']}), Python {machine['python']}, code {machine['code']}."
    )


def row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def search(beam: int) -> str:
    return "greedy" if beam == 1 else f"beam {beam}"


def figure(value: Any, form: str = ",.0f") -> str:
    return "" if value is None else format(value, form)


def check(records: list[Record], _: list[Record]) -> Iterator[list[str]]:
    yield ["model", "format", "search", "way", "as on the CPU in float32", "as alone",
           "before, as alone", "invariant", "rows of the same bits"]  # fmt: skip
    for one in records:
        invariant = {None: "", True: "yes", False: "no"}[one.get("invariant")]
        equal = ""
        if "equal_rows" in one:
            mine, all_of_them = rows_of(one["equal_rows"])
            equal = f"{mine} of {all_of_them}"
        known = before.AS_ALONE.get((one["format"], one["beam"]))
        yield [
            f"{one['model']}, {one['sentences']}", one["format"], search(one["beam"]), one["way"],
            f"{one['as_cpu']:.1%}", f"{one['as_alone']:.1%}", figure(known, ".0%"),
            f"{invariant}, in tiles" if one.get("tiled") else invariant, equal,
        ]  # fmt: skip


def step(records: list[Record], _: list[Record]) -> Iterator[list[str]]:
    yield ["format", "search", "rows", "computed", "ms", "before, ms", "floor, ms", "ms / floor",
           "kernels", "before", "gaps", "s to record"]  # fmt: skip
    for one in records:
        if "ceiling" in one:
            continue
        known = None
        if one["format"] == "float16":
            known = before.STEPS.get((one["beam"], one["rows"]))
        floor = one.get("floor_ms")
        yield [
            one["format"], search(one["beam"]), figure(one["rows"]), figure(one["computed_rows"]),
            f"{one['ms']:.3f}", figure(known and known[0], ".3f"), figure(floor, ".3f"),
            figure(floor and one["ms"] / floor, ".1f"), figure(one.get("kernels"), ".0f"),
            figure(before.KERNELS.get(one["beam"])), figure(one.get("gaps"), ".0%"),
            f"{one['recording_s']:.2f}",
        ]


def engine(records: list[Record], steps: list[Record]) -> Iterator[list[str]]:
    yield ["format", "search", "rows", "tokens/s", "before", "its steps allow", "share",
           "/ GNMT's 29,646", "s to build"]  # fmt: skip
    names = ("size", "format", "beam", "rows")
    allowed = {tuple(one[name] for name in names): one["tokens_per_second_allowed"]
               for one in steps if "rows" in one}  # fmt: skip
    for one in records:
        place = one["beam"], one["rows"]
        known = before.ENGINE_FLOAT32.get(place) if one["format"] == "float32" else None
        if one["format"] == "float16" and place in before.STEPS:
            known = int(before.STEPS[place][1])
        most = allowed.get(tuple(one[name] for name in names))
        rate = one["tokens_per_second"]
        yield [
            one["format"], search(one["beam"]), figure(one["rows"]), figure(rate), figure(known),
            figure(most), figure(most and rate / most, ".0%"),
            figure(rate / before.PUBLISHED if one["beam"] == 5 else None, ".2f"),
            f"{one['building_s']:.1f}",
        ]


def serve(records: list[Record], _: list[Record]) -> Iterator[list[str]]:
    yield ["store", "weights", "rows", "search", "clients", "requests/s", "before", "p50, ms",
           "p99, ms", "as alone"]  # fmt: skip
    for one in records:
        head = [one["store"], one["weights"], one["rows"] or "shipped"]
        if one["what"] == "ready":
            yield [*head, "READY", "", f"after {one['ready_s']:.1f} s",
                   f"after {before.READY:.0f} s", "", "", ""]  # fmt: skip
        elif one["what"] == "company":
            yield [*head, one["search"], "", "", "", f"{one['alone_ms']:.1f}", "",
                   f"{one['as_alone']:.1%}"]  # fmt: skip
        else:
            known = before.SERVED.get((one["search"], one["clients"]), "")
            yield [*head, one["search"], one["clients"], figure(one["per_second"]), known,
                   f"{one['p50_ms']:.1f}", f"{one['p99_ms']:.1f}", ""]  # fmt: skip


def train(records: list[Record], _: list[Record]) -> Iterator[list[str]]:
    yield ["model", "batch", "ms an update", "target words/s", "before", "device busy, ms",
           "kernels", "precision", "peak GiB"]  # fmt: skip
    for one in records:
        peak = one.get("peak_bytes")
        yield [
            f"{one['model']} ({one['parameters'] / 1e6:.0f}M)", f"{one['sentences']} x "
            f"{one['tokens']}", f"{one['ms']:.1f}", figure(one["words_per_second"]),
            before.UPDATES.get((one["model"], one["sentences"]), ""),
            figure(one.get("busy_ms"), ".1f"), figure(one.get("kernels")), one["precision"],
            figure(peak and peak / 2**30, ".1f"),
        ]  # fmt: skip
