"""The figures of a report, each drawn for light and for dark pages.

Needs matplotlib, which only this verb needs; nothing else of this package imports it at its top.
"""

import io
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from training.report.analysis import FrequencyBucket, LengthBucket
from training.report.attention import Alignment
from training.report.curves import Curves, Series
from training.report.fonts import Fonts, fonts_for, labels, right_to_left

WIDTH, HEIGHT = 4.2, 2.7  # inches: at 96 pixels each, as wide as a phone shows
DOTS = 192  # an inch, for screens of twice as many pixels
CELL = 0.26  # inches of a heat map's cell, a line of text high


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. Those of data are of Okabe and Ito's palette, which colour-blind
    people can tell apart; heat maps go from the page to the first."""

    name: str
    paper: str
    ink: str
    grid: str
    first: str
    second: str
    third: str
    strongest: str

    @property
    def lines(self) -> tuple[str, str, str]:
        return self.first, self.second, self.third

    @property
    def heat(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list("heat", [self.paper, self.first, self.strongest])


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#d5d9de", "#0072b2", "#d55e00", "#009e73", "#002b45")
DARK = Theme("dark", "#15191e", "#e3e7eb", "#3a424b", "#56b4e9", "#e69f00", "#2ecc9f", "#f2faff")
THEMES = (LIGHT, DARK)
Draw = Callable[[Theme], Figure]


@dataclass(frozen=True)
class Picture:
    """One figure as PNG files, one of each theme, and its size in CSS pixels.

    missing: characters that no font of this machine has.
    """

    name: str
    files: dict[str, bytes]
    width: int
    height: int
    missing: frozenset[str] = frozenset()


def picture(name: str, draw: Draw, fonts: Fonts | None = None) -> Picture:
    """What `draw` makes, as PNG; the same bytes from the same figures.

    Args:
        fonts: of a figure that is as large as its labels need; else it has its own size.
    """
    files, size = {}, (0, 0)
    families = fonts.families if fonts else fonts_for([]).families
    for theme in THEMES:
        style: dict[str, Any] = {
            "font.family": families, "font.size": 9.0, "axes.titlesize": 9.5,
            "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "axes.axisbelow": True, "grid.color": theme.grid,
            "grid.linewidth": 0.6, "figure.facecolor": theme.paper, "axes.facecolor": theme.paper,
            "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.ink,
            "xtick.color": theme.ink, "ytick.color": theme.ink, "legend.frameon": False,
            "lines.linewidth": 1.5,
        }  # fmt: skip
        with matplotlib.rc_context(style):  # type: ignore[arg-type]  # its names are literals
            figure = draw(theme)
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=DOTS, bbox_inches="tight" if fonts else None)
        files[theme.name] = stream.getvalue()
        dots = struct.unpack(">II", files[theme.name][16:24])  # of PNG's first chunk, IHDR
        size = dots[0] * 96 // DOTS, dots[1] * 96 // DOTS
    return Picture(name, files, *size, fonts.missing if fonts else frozenset())


def axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# Curves


@dataclass(frozen=True)
class Line:
    """A series, and what the legend calls it."""

    name: str
    series: Series
    marked: bool = False  # few points, each worth a mark


@dataclass(frozen=True)
class Panel:
    """One small figure of curves.

    best: a step whose weights were kept, marked on the first line that has it.
    limit: a level worth a dashed line, and its name.
    """

    name: str
    title: str
    unit: str
    lines: list[Line]
    last: int  # where the axis of steps ends, the same for all panels
    best: int | None = None
    limit: tuple[str, float] | None = None
    logarithmic: bool = False

    @property
    def empty(self) -> bool:
        return not any(line.series[0] for line in self.lines)


def panels(curves: Curves, best: int | None, clip_norm: float) -> list[Panel]:
    """Everything that metrics.jsonl tells; panels without a point are left out."""
    steps, perplexities = curves.series("validation", "perplexity")
    perplexity = Line("validation", (steps, perplexities), True)
    logarithms = [math.log(max(value, 1.0)) for value in perplexities]
    bleu = Line("validation", curves.series("validation", "bleu"), True)

    def logged(name: str, title: str = "training") -> Line:
        return Line(title, curves.series("training", name))

    loss = [logged("loss"), Line("validation", (steps, logarithms), True)]
    objective = logged("objective", "objective")
    if objective.series[0] and objective.series != loss[0].series:
        loss.append(objective)
    speeds = [
        logged(f"{side}_tokens_per_second", f"{side} tokens") for side in ("target", "source")
    ]
    last = max(curves.last_step, 1)
    found = [
        Panel("loss", "Loss", "nats per target token", loss, last),
        Panel("perplexity", "Perplexity of validation text", "perplexity per token", [perplexity],
              last, best, logarithmic=True),
        Panel("bleu", "BLEU of validation text", "BLEU (0 to 100)", [bleu], last, best),
        Panel("learning_rate", "Learning rate", "learning rate", [logged("learning_rate")], last),
        Panel("gradient_norm", "Norm of the gradient, before clipping", "L2 norm",
              [logged("gradient_norm")], last, limit=("clip_norm", clip_norm), logarithmic=True),
        Panel("speed", "Speed of training", "tokens per second", speeds, last),
    ]  # fmt: skip
    return [one for one in found if not one.empty]


def draw_panel(panel: Panel, theme: Theme) -> Figure:
    figure, ax = axes()
    shown = [line for line in panel.lines if line.series[0]]
    for line, colour, style in zip(shown, theme.lines, ("-", "--", "-.")):
        marker = "o" if line.marked or len(line.series[0]) == 1 else ""
        ax.plot(*line.series, style, color=colour, label=line.name, marker=marker, markersize=3.5)
    ax.set_title(panel.title, pad=20 if len(shown) > 1 or panel.best or panel.limit else 6)
    ax.set_xlabel("step (updates of the weights)")
    ax.set_ylabel(panel.unit)
    ax.set_xlim(-0.02 * panel.last, 1.03 * panel.last)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = [value for line in shown for value in line.series[1]]
    if panel.logarithmic and min(values) > 0 and max(values) > 8 * min(values):
        logarithmic_axis(ax)
    elif max(values) < 0.1:
        ax.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
    else:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if panel.limit:
        name, level = panel.limit
        ax.axhline(level, color=theme.second, linestyle=":", linewidth=1.2, label=name)
    steps, points = shown[0].series
    if panel.best in steps:
        point = points[steps.index(panel.best)]
        ax.plot([panel.best], [point], "D", color=theme.second, label=f"kept weights: {point:.2f}",
                markersize=6)  # fmt: skip
    handles, names = ax.get_legend_handles_labels()
    if len(handles) > 1:  # above the axes, where no curve can be under it
        ax.legend(handles, names, loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3,
                  fontsize=8, borderaxespad=0.1, handlelength=1.8, columnspacing=1.2)  # fmt: skip
    return figure


def logarithmic_axis(ax: Axes) -> None:
    """Figures as people write them instead of powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


# Scores of a test set


def draw_lengths(buckets: Sequence[LengthBucket], theme: Theme) -> Figure:
    figure, ax = axes(height=2.9)
    places = range(len(buckets))
    around = [[b.bleu - min(b.low, b.bleu) for b in buckets],
              [max(b.high, b.bleu) - b.bleu for b in buckets]]  # fmt: skip
    ax.errorbar(places, [b.bleu for b in buckets], yerr=around, fmt="o", color=theme.first,
                markersize=6, capsize=4)  # fmt: skip
    ax.set_xticks(places, [f"{b.name}\nn={b.sentences:,}" for b in buckets], fontsize=8)
    ax.set_xlim(-0.6, len(buckets) - 0.4)
    ax.grid(axis="x", visible=False)
    for place, bucket in enumerate(buckets):
        ax.annotate(f"{bucket.bleu:.1f}", (place, bucket.bleu), xytext=(6, 0), fontsize=8,
                    textcoords="offset points", va="center")  # fmt: skip
    ax.set_xlabel("tokens of the source; n sentences")
    ax.set_ylabel("BLEU (0 to 100)")
    return figure


def draw_frequencies(buckets: Sequence[FrequencyBucket], theme: Theme) -> Figure:
    lines = max(len(buckets), 4)  # as high as the name of the axis is long
    figure, ax = axes(height=0.9 + 0.29 * lines)
    places = range(len(buckets))
    ax.barh(places, [b.f1 for b in buckets], height=0.68, color=theme.first)
    for place, bucket in enumerate(buckets):
        ax.annotate(f"{bucket.f1:.2f}", (bucket.f1, place), xytext=(3, 0), fontsize=8,
                    textcoords="offset points", va="center")  # fmt: skip
    ax.set_yticks(places, [f"{b.name}  (n={b.references:,})" for b in buckets], fontsize=8)
    ax.set_ylim(lines - 0.5, -0.5)  # rare words first, as in the table beside it
    ax.set_xlim(0, 1.12)
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("F1 of words (0 to 1)")
    ax.set_ylabel("times seen in training")
    return figure


# Attention


def heat_map(name: str, alignment: Alignment) -> Picture:
    fonts = fonts_for([*alignment.source, *alignment.target])
    return picture(name, partial(draw_attention, alignment, fonts), fonts)


def draw_attention(alignment: Alignment, fonts: Fonts, theme: Theme) -> Figure:
    """Rows: target tokens, in the order of decoding. Columns: source tokens, in the direction in
    which their script is read. Cells are squares, as large in every figure."""
    rows, columns = len(alignment.target), len(alignment.source)
    wide, high = CELL * columns, CELL * rows
    bar_wide, bar_high = 0.14, max(1.3, min(high, 3.0))
    total_wide, total_high = wide + 0.2 + bar_wide, max(high, bar_high)
    figure = Figure(figsize=(total_wide, total_high))  # saved with what is beside it

    def place(left: float, width: float, height: float) -> Axes:
        inches = (left / total_wide, 1 - height / total_high, width / total_wide,
                  height / total_high)  # fmt: skip
        return figure.add_axes(inches)

    ax = place(0.0, wide, high)
    mesh = ax.pcolormesh(alignment.weights, cmap=theme.heat, vmin=0, vmax=1, linewidth=0.4,
                         edgecolors=theme.grid)  # fmt: skip
    plain: dict[str, Any] = {"parse_math": False}  # a token may hold a dollar sign
    ax.set_xticks([i + 0.5 for i in range(columns)], labels(alignment.source, fonts.missing),
                  rotation=90, **plain)  # fmt: skip
    ax.set_yticks([i + 0.5 for i in range(rows)], labels(alignment.target, fonts.missing), **plain)
    ax.invert_yaxis()
    if right_to_left(alignment.source):
        ax.invert_xaxis()
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("source tokens")
    ax.set_ylabel("target tokens")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, cax=place(wide + 0.2, bar_wide, bar_high))
    bar.set_label("attention weight")
    bar.outline.set_edgecolor(theme.grid)
    return figure
