"""What training logged: the lines of metrics.jsonl as series over its steps."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Series = tuple[list[int], list[float]]  # steps, and the figure at each
KINDS = ("training", "validation")


@dataclass(frozen=True)
class Curves:
    """The lines of each kind, in order, and how many could not be read."""

    lines: dict[str, list[dict[str, Any]]]
    unreadable: int

    @classmethod
    def read(cls, path: Path) -> "Curves":
        """From metrics.jsonl. A run that is training, or that crashed, may end in half a line."""
        lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        unreadable = 0
        for line in path.read_bytes().splitlines():
            try:
                figures = json.loads(line)
                step, kind = figures["step"], figures["kind"]
                if not isinstance(step, int):
                    raise TypeError("a step is a number")
                lines[kind].append(figures)
            except (ValueError, KeyError, TypeError):
                unreadable += 1
        return cls(lines, unreadable)

    def series(self, kind: str, name: str) -> Series:
        """The figures called `name`; lines without it, or where it is no number, are left out."""
        found = [(one["step"], one.get(name)) for one in self.lines[kind]]
        numbers = [
            (step, float(value))
            for step, value in found
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        return [step for step, _ in numbers], [value for _, value in numbers]

    @property
    def last_step(self) -> int:
        """The last step of which anything is known; 0 where nothing is."""
        return max((one["step"] for lines in self.lines.values() for one in lines), default=0)
