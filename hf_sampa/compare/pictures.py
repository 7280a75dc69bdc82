"""Pictures of a comparison. Methods keep their colour and mark in all of them; colours are told apart by colour-blind people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import Mean, mean


# Okabe and Ito's, without the yellow that no page shows.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
MARKS = "osD^vP*X"
WIDE = 3  # panels beside each other
MOST_TICKS = 6  # of single values, as those that were tried
SMALLEST_PART = 0.25  # of a scale that panels share, which each of them has to fill


class Look:
    """Colour and mark of each method, no two alike: where colours begin anew, they have another mark."""

    def __init__(self, methods: Sequence[str]):
        self.methods = list(methods)

    def of(self, method: str) -> dict[str, Any]:
        i = self.methods.index(method)
        mark = MARKS[(i + i // len(COLORS)) % len(MARKS)]
        return {"color": COLORS[i % len(COLORS)], "marker": mark, "label": method}


def scores(by_task: Mapping[str, Mapping[str, Mean]], look: Look, unit: str, file: Path) -> None:
    """A panel for each task: every method's mean with its interval."""
    figure, panels = _panels(list(by_task), height=0.5 + 0.32 * len(look.methods))
    for axes, (task, found) in zip(panels, by_task.items(), strict=True):
        for place, method in enumerate(look.methods):
            if method in found:
                each, own = found[method], look.of(method)
                axes.errorbar(
                    each.value, -place, xerr=_finite(each.half), fmt=own["marker"], color=own["color"], capsize=3
                )
        axes.set(
            title=task, xlabel=unit, yticks=[-i for i in range(len(look.methods))], ylim=(0.5 - len(look.methods), 0.5)
        )
        axes.set_yticklabels(look.methods)
        axes.grid(axis="x", alpha=0.3)
    _share_scale(panels)
    if unit.endswith("%"):  # an interval of Student's t may go beyond what there is
        for axes in panels:
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, -100), min(high, 100))
    figure.savefig(file)


def _share_scale(panels: Sequence[Axes]) -> None:
    """One scale across, so that panels are compared by eye; unless one of them would be pressed together by it."""
    limits = [axes.get_xlim() for axes in panels]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if all(own_high - own_low >= SMALLEST_PART * (high - low) for own_low, own_high in limits):
        for axes in panels:
            axes.set_xlim(low, high)


def courses(
    by_task: Mapping[str, Mapping[str, Sequence[Sequence[Sequence[float]]]]],
    look: Look,
    unit: str,
    file: Path,
    scale: str = "linear",
) -> None:
    """A panel for each task: the score on the way, a thin line for each seed and a thick one for the mean."""
    figure, panels = _panels(list(by_task))
    for axes, (task, of_methods) in zip(panels, by_task.items(), strict=True):
        for method, runs in of_methods.items():
            color = look.of(method)["color"]
            for run in runs:
                axes.plot(*zip(*run, strict=True), color=color, linewidth=0.6, alpha=0.4)
            steps = sorted(set.intersection(*({step for step, _ in run} for run in runs)))
            means = [mean([dict(map(tuple, run))[step] for run in runs]).value for step in steps]
            axes.plot(steps, means, linewidth=2, markersize=4, **look.of(method))
        axes.set(title=task, xlabel="step (updates of the weights)", ylabel=unit, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    figure.savefig(file)


def against(
    points: Mapping[str, Mapping[str, tuple[Mean, Mean]]], look: Look, across: str, up: str, file: Path
) -> None:
    """A panel for each task: a mark for each method, with intervals both ways."""
    figure, panels = _panels(list(points))
    for axes, (task, of_methods) in zip(panels, points.items(), strict=True):
        for method, (x, y) in of_methods.items():
            own = look.of(method)
            axes.errorbar(
                x.value, y.value, xerr=_finite(x.half), yerr=_finite(y.half), fmt=own["marker"], color=own["color"],
                label=method, capsize=2,
            )  # fmt: skip
        axes.set(title=task, xlabel=across, ylabel=up)
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    figure.savefig(file)


def sweeps(
    by_name: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    look: Look,
    unit: str,
    file: Path,
) -> None:
    """A panel for each task and setting: what was scored with its values, a small mark for each run and a line through the means."""
    figure, panels = _panels([f"{task}: {name}" for task, name in by_name])
    for axes, (_, name), of_methods in zip(panels, by_name, by_name.values(), strict=True):
        for method, points in of_methods.items():
            color = look.of(method)["color"]
            for x, found in points:
                axes.plot([x] * len(found), found, ".", color=color, markersize=3, alpha=0.6)
            xs, means = zip(*sorted((x, mean(found).value) for x, found in points), strict=True)
            axes.plot(xs, means, linewidth=1.2, markersize=5, **look.of(method))
        values = sorted({x for points in of_methods.values() for x, _ in points})
        if values[0] > 0:
            axes.set_xscale("log")
        shown = values if len(values) <= MOST_TICKS else [values[0], values[len(values) // 2], values[-1]]
        axes.set_xticks(shown, labels=[f"{x:g}" for x in shown])
        axes.minorticks_off()
        axes.set(xlabel=name, ylabel=unit)
        axes.grid(alpha=0.3)
    _legend(figure, panels)
    figure.savefig(file)


def landscape(found: Mapping[str, Any], look: Look, file: Path) -> None:
    """The loss between the weights of two methods, and along random directions from those of each, a thin line for each direction."""
    first, last = found["methods"]
    figure, (between, around) = _panels(["between two methods", "along random directions"], height=3.0)
    between.plot(found["way"], found["between"], color="#555555", marker=".", linewidth=1.2)
    for place, method in ((0, first), (1, last)):
        between.axvline(place, color=look.of(method)["color"], linewidth=1, linestyle="--")
    between.set(xlabel=f"0: {first}, 1: {last}", ylabel="evaluation loss")
    for method, lines in found["around"].items():
        for line in lines:
            around.plot(found["distances"], line, color=look.of(method)["color"], linewidth=0.6, alpha=0.5)
        means = [mean(values).value for values in zip(*lines, strict=True)]
        around.plot(found["distances"], means, linewidth=1.8, markersize=4, **look.of(method))
    around.set(xlabel="distance, of each filter's length", ylabel="evaluation loss")
    for axes in (between, around):
        low, high = axes.dataLim.intervaly
        if 0 < 10 * low < high:  # over less, a logarithm's ticks cannot be read
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    _legend(figure, [around])
    figure.savefig(file)


def _panels(titles: Sequence[str], height: float = 2.6) -> tuple[Figure, list[Axes]]:
    across = min(WIDE, math.ceil(math.sqrt(len(titles))))
    down = -(-len(titles) // across)
    figure = Figure(figsize=(3.4 * across + 0.8, (height + 0.7) * down + 0.4), dpi=130, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for each, title in zip(axes, titles, strict=False):
        each.set_title(title)
        each.spines[["top", "right"]].set_visible(False)
    for each in axes[len(titles) :]:
        each.remove()
    return figure, axes[: len(titles)]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Of all methods that any panel has, in as many columns as the picture is wide enough for."""
    of_methods = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            of_methods.values(), of_methods.keys(), loc="outside lower center", ncols=columns, frameon=False
        )
        width = legend.get_window_extent(renderer).width
        if width <= figure.bbox.width:
            return
        if columns > 1:
            legend.remove()
    figure.set_figwidth(1.05 * width / figure.dpi)  # for names longer than the picture was wide


def _finite(half: float) -> float | None:
    return half if half == half else None  # nan: of one value there is no interval
