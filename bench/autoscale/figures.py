"""What happened in a trace, drawn for light and for dark pages. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from bench.autoscale.cluster import Run, Window
from training.report.figures import Picture, Theme, picture

SIZE = 6.4, 6.0  # inches
POINTS = 240  # in a line: windows are put together until there are no more


def draw(runs: Sequence[Run], arrivals: float, good: float) -> Picture:
    """One figure of a trace under several autoscalers, whose first has its p50 drawn too.

    Args:
        arrivals: requests/s that a pod is meant to get.
        good: s, of p99.
    """
    return picture(runs[0].trace.name, lambda theme: _figure(theme, runs, arrivals, good))


def _figure(theme: Theme, runs: Sequence[Run], arrivals: float, good: float) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    load, pods, late, refused = figure.subplots(
        4, sharex=True, height_ratios=[1.0, 1.6, 1.6, 1.0]
    )
    trace = runs[0].trace
    unit, name = (3600, "hours") if trace.seconds > 4 * 3600 else (60, "minutes")
    colors = [theme.first, theme.second, theme.third, theme.ink]

    windows = [_thinned(run.windows) for run in runs]
    times = [one.time / unit for one in windows[0]]
    rates = [trace.rate(one.time) for one in windows[0]]
    load.plot(times, rates, color=theme.ink, drawstyle="steps-post")
    pods.plot(
        times, [max(1, math.ceil(one / arrivals)) for one in rates], color=theme.ink,
        linestyle=":", drawstyle="steps-post", label=f"load / {arrivals:g}",
    )  # fmt: skip
    # The first is drawn last: it is what the figure is about. Others may lie on one another.
    for i in (*range(1, len(runs)), 0):
        style = {"color": colors[i], "drawstyle": "steps-post", "linestyle": "--" if i > 1 else "-"}
        at = [one.time / unit for one in windows[i]]
        pods.plot(at, [one.replicas for one in windows[i]], label=runs[i].scaler, **style)
        late.plot(at, [1000 * one.p99 for one in windows[i]], label=runs[i].scaler, **style)
        shares = [100 * one.refused / max(one.arrived, 1) for one in windows[i]]
        refused.plot(at, shares, **style)
    own = windows[0]
    late.plot(
        [one.time / unit for one in own], [1000 * one.p50 for one in own], color=colors[0],
        linewidth=0.8, drawstyle="steps-post",
    )  # fmt: skip
    late.axhline(1000 * good, color=theme.ink, linewidth=0.8, linestyle=":")
    late.set_yscale("log")
    late.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    late.yaxis.set_minor_formatter(FuncFormatter(_some))
    load.set_title("requests/s")
    pods.set_title("pods wanted")
    late.set_title(f"ms: p99; thin: p50 of {runs[0].scaler}; dotted: {1000 * good:g}")
    refused.set_title("refused, %")
    most = max(one.replicas for each in windows for one in each)
    pods.set_ylim(0, most + 0.6)
    pods.yaxis.set_major_locator(MultipleLocator(2))
    for one in (load, refused):
        one.set_ylim(bottom=0)
        one.yaxis.set_major_locator(MaxNLocator(3))
    if not any(one.refused for each in windows for one in each):
        refused.set_ylim(0, 1)
    refused.set_xlabel(name)
    refused.set_xlim(0, trace.seconds / unit)
    if trace.outage is not None:
        for one in (load, pods, late, refused):
            one.axvspan(
                trace.outage.begin / unit, trace.outage.end / unit, color=theme.grid, alpha=0.5,
                linewidth=0,
            )  # fmt: skip
        load.set_title("requests/s; shaded: nothing is scraped")
    _legend(pods, late)
    return figure


def _legend(pods: Axes, late: Axes) -> None:
    """Above all, in the order of the runs."""
    handles, labels = pods.get_legend_handles_labels()
    order = [len(labels) - 1, *range(1, len(labels) - 1), 0]
    pods.figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], ncols=len(order),
        loc="outside upper center",
    )  # fmt: skip


def _some(ms: float, _: object) -> str:
    """Labels of a logarithmic axis between powers of ten."""
    return f"{ms:g}" if f"{ms:e}"[0] in "25" else ""


def _thinned(windows: Sequence[Window]) -> list[Window]:
    """As few as are drawn: of several, the most pods, the worst p99 and all that was refused."""
    step = math.ceil(len(windows) / POINTS)
    return [_joined(windows[i : i + step]) for i in range(0, len(windows), step)]


def _joined(some: Sequence[Window]) -> Window:
    known = [one for one in some if not math.isnan(one.p99)] or some
    return Window(
        some[0].time,
        max(one.replicas for one in some),
        min(one.ready for one in some),
        sum(one.arrived for one in some),
        sum(one.refused for one in some),
        sorted(one.p50 for one in known)[len(known) // 2],
        max(one.p99 for one in known),
    )


