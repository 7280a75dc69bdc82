"""The drawings of the documentation: `python docs/figures.py` writes step.svg and two_processes.svg, each time the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


HERE = Path(__file__).parent
STEPS = 2
# Okabe and Ito's colours, light enough for black letters: one for each batch.
BATCHES = ("#A6D4EE", "#F5C96B", "#8FD6BF", "#E3B5D2")
WHITE, GREY = "#FFFFFF", "#E4E4E4"
# Of the parts of a step, in units of the horizontal axis.
START, DISPLACE, PASS, EXCHANGE, UPDATE = 4.6, 1.3, 4.6, 1.9, 1.2
STEP = DISPLACE + PASS + EXCHANGE + UPDATE
# Lower edges of the two processes' lanes, and their height.
PERTURBED, LOOKAHEAD, HEIGHT = 3.0, 0.0, 1.7


def box(ax: Axes, left: float, bottom: float, width: float, text: str, colour: str, height: float = HEIGHT) -> None:
    """A box of a lane, with its text in the middle."""
    ax.add_patch(plt.Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="black", linewidth=0.8))
    ax.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=10, linespacing=1.5)


def arrow(ax: Axes, place: float, start: float, end: float, text: str) -> None:
    """A vertical arrow between the lanes, with its text on the left."""
    ax.annotate("", xy=(place, end), xytext=(place, start), arrowprops={"arrowstyle": "-|>", "color": "black"})
    ax.text(place - 0.12, (start + end) / 2, text, ha="right", va="center", fontsize=10)


def draw_step(ax: Axes, t: int) -> None:
    """Everything between x_t and x_{t+1}."""
    left = START + t * STEP
    works, ends, updates = left + DISPLACE, left + DISPLACE + PASS, left + STEP - UPDATE
    box(ax, left, PERTURBED, DISPLACE, rf"$\tilde{{x}}_{t}$", WHITE)
    box(ax, left, LOOKAHEAD, DISPLACE, rf"$y_{t + 1}$", WHITE)
    perturbed = rf"$\tilde{{g}}_{t}=\nabla f(\tilde{{x}}_{t};\,B_{t})$"
    lookahead = rf"$g_{t + 1}=\nabla f(y_{t + 1};\,B_{t + 1})$"
    box(ax, works, PERTURBED, PASS, f"forward, backward\n{perturbed}", BATCHES[t])
    box(ax, works, LOOKAHEAD, PASS, f"forward, backward\n{lookahead}", BATCHES[t + 1])
    arrow(ax, ends + 0.75, PERTURBED + HEIGHT / 2, LOOKAHEAD + HEIGHT / 2, rf"$\tilde{{g}}_{t}$")
    arrow(ax, ends + 1.6, LOOKAHEAD + HEIGHT / 2, PERTURBED + HEIGHT / 2, rf"$g_{t + 1}$")
    for lane in (PERTURBED, LOOKAHEAD):
        box(ax, updates, lane, UPDATE, rf"$x_{t + 1}$", GREY)
    ax.text(left + STEP / 2, PERTURBED + HEIGHT + 0.45, f"step {t}", ha="center", va="center", fontsize=11)
    ax.plot([left, left], [LOOKAHEAD - 0.2, PERTURBED + HEIGHT + 0.7], color="grey", linewidth=0.8, linestyle=":")


def step() -> Figure:
    """One step of a pair, from x_t to x_{t+1}."""
    figure, ax = plt.subplots(figsize=(8.6, 3.5))
    ax.set_axis_off()
    lanes = {
        3.6: (
            "process 0, at the perturbed weights",
            "displace\n" + r"$\tilde{x}_t=x_t+\rho\,g_t/\Vert g_t\Vert$",
            r"on batch $B_t$" + "\n" + r"$\tilde{g}_t=\nabla f(\tilde{x}_t;\,B_t)$",
            BATCHES[0],
        ),
        0.0: (
            "process 1, at the look-ahead weights",
            "look ahead\n" + r"$y_{t+1}=U(x_t,\,g_t)$",
            r"on batch $B_{t+1}$" + "\n" + r"$g_{t+1}=\nabla f(y_{t+1};\,B_{t+1})$",
            BATCHES[1],
        ),
    }
    height, mix = 2.3, "mix\n" + r"$G_t=(1-\lambda)\,\tilde{g}_t+\lambda\,g_{t+1}$"
    for bottom, (name, displace, gradient, colour) in lanes.items():
        ax.text(0, bottom + height + 0.45, name, ha="left", va="center", fontsize=10, fontweight="bold")
        box(ax, 0, bottom, 2.4, "$x_t$\n$g_t$", GREY, height)
        box(ax, 3.0, bottom, 6.0, displace, WHITE, height)
        box(ax, 9.6, bottom, 6.8, gradient, colour, height)
        box(ax, 19.4, bottom, 6.6, mix, WHITE, height)
        box(ax, 26.6, bottom, 5.4, "update\n$x_{t+1}=U(x_t,\\,G_t)$", GREY, height)
        for left, right in ((2.4, 3.0), (9.0, 9.6), (26.0, 26.6), (16.4, 19.4)):
            tip = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=(right, bottom + height / 2), xytext=(left, bottom + height / 2), arrowprops=tip)
    arrow(ax, 17.6, 3.6 + height / 2, height / 2, r"$\tilde{g}_t$")
    arrow(ax, 18.6, height / 2, 3.6 + height / 2, "")
    ax.text(18.75, (3.6 + height) / 2, "$g_{t+1}$", ha="left", va="center", fontsize=10)
    ax.text(9.6, -0.75, "at the same time", ha="left", va="center", fontsize=10, style="italic")
    ax.text(
        19.4, -0.75, "the same on both processes, to the last bit", ha="left", va="center", fontsize=10, style="italic"
    )
    ax.set_xlim(-0.3, 32.3)
    ax.set_ylim(-1.3, 6.9)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    return figure


def two_processes() -> Figure:
    """Who computes what in the first two steps of a pair."""
    figure, ax = plt.subplots(figsize=(9.8, 3.9))
    ax.set_axis_off()
    names = {PERTURBED: "process 0\nat perturbed\nweights", LOOKAHEAD: "process 1\nat look-ahead\nweights"}
    for lane, name in names.items():
        ax.text(-0.4, lane + HEIGHT / 2, name, ha="right", va="center", fontsize=10)
    first = "once, at the start\n" + r"$g_0=\nabla f(x_0;\,B_0)$"
    box(ax, 0, LOOKAHEAD, START - 0.5, first, BATCHES[0])
    arrow(ax, START - 0.25, LOOKAHEAD + HEIGHT / 2, PERTURBED + HEIGHT / 2, "$g_0$")
    for t in range(STEPS):
        draw_step(ax, t)
    ax.text(
        0,
        -0.9,
        "White: displace the weights.   Grey: the update.   Arrows: the exchange.   One colour: one batch.",
        ha="left",
        va="center",
        fontsize=10,
        linespacing=1.7,
    )
    ax.set_xlim(-4.0, START + STEPS * STEP + 0.2)
    ax.set_ylim(-1.4, PERTURBED + HEIGHT + 0.8)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    return figure


DRAWINGS = {"step.svg": step, "two_processes.svg": two_processes}


def write(folder: Path) -> None:
    """Draw all pictures into `folder`."""
    for name, draw in DRAWINGS.items():
        with plt.rc_context({"svg.hashsalt": "hf_sampa", "svg.fonttype": "path", "mathtext.fontset": "dejavusans"}):
            figure = draw()
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    write(HERE)
