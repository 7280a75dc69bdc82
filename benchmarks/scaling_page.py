"""The tables and the picture of docs/scaling.md: what the cost model predicts for three models on 2 to 1024 devices.

    python benchmarks/scaling_page.py             # all tables, in Markdown
    python benchmarks/scaling_page.py --write     # puts them, and the picture, into the page

Measured are the two tables that come from rank_scaling.json, which rank_scaling.py wrote. All else follows from predictions.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import cost_model
import matplotlib
import predictions
import rank_scaling
from cost_model import Layout, Step, operations, seconds_of_step, sent_per_node
from predictions import (
    COLUMNS,
    NETWORKS,
    PER_NODE,
    Model,
    Predicted,
    fastest,
    fastest_of_column,
    fitting,
    models,
    orders,
)
from tables import as_table

from hf_sampa.plan.layouts import Layout as Planned
from hf_sampa.plan.memory import GB, memory


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


MEASURED = Path(__file__).with_name("rank_scaling.json")
DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "scaling.md", DOCS / "_static" / "scaling.svg"
# Of the picture.
DEVICES = [2**n for n in range(1, 11)]
COLORS = {"AdamW": "#009E73", "SAM": "#E69F00", "SAMPa": "#0072B2"}


# ---- Tables ----

NO = "-"  # what does not fit, or needs more devices
APART, WITHIN = "apart", "within"  # the order of pairs

# Devices, those of a node, what is between nodes, and what a reader is told of it.
PLACES = [
    *((n, n, "Ethernet", "NVLink") for n in (2, 4, 8)),
    *((n, PER_NODE, "InfiniBand", "NVLink, InfiniBand") for n in (16, 64, 256, 1024)),
    *((n, PER_NODE, "Ethernet", "NVLink, Ethernet") for n in (16, 64, 256, 1024)),
    *((n, 1, "Ethernet", "Ethernet") for n in (2, 8, 64)),
]
FEW_PLACES = [place for place in PLACES if place[0] in (2, 8, 64) and place[1] > 1]


def assumptions() -> str:
    sheet = "NVIDIA's data sheet of the H100 SXM"
    rows = [
        ["a device computes", f"{predictions.FLOPS / 1e12:.0f} TFLOP/s in bf16", sheet],
        *(
            [
                f"of which a pass of {name} reaches",
                f"{model.efficiency:.0%}",
                "[measured](cost.md#on-one-gpu): 26 ms for AdamW's step" if name == "BERT-base" else "assumed",
            ]
            for name, model in models().items()
        ),
        ["work of a pass", "6 d FLOP per token, of which 4 d in backward", "multiplications by the weights, alone"],
        ["a device's memory", f"{predictions.DEVICE_MEMORY / GB:.0f} GB, {predictions.HBM / 1e12:.2f} TB/s", sheet],
        ["NVLink", f"{predictions.NVLINK / 1e9:.0f} GB/s per device and direction", sheet],
        ["Ethernet", f"100 Gbit/s, {predictions.ETHERNET / 1e9:.1f} GB/s per node and direction", "assumed"],
        ["InfiniBand", f"8 x 400 Gbit/s, {predictions.INFINIBAND / 1e9:.0f} GB/s per node and direction", "assumed, as in a DGX H100"],
        ["of every bandwidth is reached", f"{predictions.ACHIEVED:.0%}", "assumed"],
        ["latency", ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in predictions.LATENCY.items()), "assumed"],
        ["devices per node", str(PER_NODE), "assumed"],
        ["gradients travel during", f"{Step.overlap:.0%} of backward", "assumed"],
        ["numbers", "fp32; under FSDP2 bf16, but across pairs", "what this package and accelerate do with `bf16=True`"],
    ]  # fmt: skip
    return as_table(["what", "figure", "from"], rows)


def model_table() -> str:
    rows = [
        [
            name,
            f"{model.size.weights / 1e6:,.0f} M",
            f"{model.step.size / GB:.2f}",
            f"{model.batch} x {model.tokens}",
            f"{1000 * model.step.pass_seconds:.0f}",
        ]
        for name, model in models().items()
    ]
    return as_table(["model", "weights, d", "a gradient, GB", "samples x tokens per device", "a pass, ms"], rows)


def per_node_table() -> str:
    """In units of an fp32 gradient: what a node's processes send to one another, and to other nodes."""
    ways = {"whole": {}, "shared": {"shared": True}, "4 shards": {"shards": 4}, "8 shards": {"shards": PER_NODE}}
    rows = []
    for nodes in (1, 2, 4, 16):
        cells = [cell_of_node(Layout("adamw", nodes * PER_NODE, PER_NODE))]
        for fields in ways.values():
            planned = Planned("sampa", nodes * PER_NODE, PER_NODE, **fields)
            found = orders(planned) if planned.replicas else []  # a role has as many processes
            cells += [cell_of_node(layout) for layout in found]
            cells += ["the same" if found else NO] * (2 - len(found))
        rows.append([str(nodes), *cells])
    head = [f"SAMPa, {way}, {order}" for way in ways for order in (APART, WITHIN)]
    return as_table([f"nodes of {PER_NODE}", "AdamW, DDP", *head], rows)


def cell_of_node(layout: Layout) -> str:
    step = Step(weights=1, pass_seconds=0)
    within, across = (sent / step.size for sent in sent_per_node(step, layout))
    return f"{within:.2f}, {across:.2f}"


def step_table(name: str) -> str:
    """Milliseconds of a step."""
    model, rows = models()[name], []
    for devices, per_node, across, told in PLACES:
        where = (devices, per_node, across)
        cells = [cell_of_step(fastest_of_column(model, column, *where)) for column in COLUMNS]
        adamw, sampa = (fastest(model, method, *where) for method in ("adamw", "sampa"))
        ratio = f"{sampa.seconds / adamw.seconds:.2f}" if adamw and sampa else NO
        rows.append([str(devices), told, *cells, ratio])
    return as_table(["devices", "links", *COLUMNS, "SAMPa / AdamW"], rows)


def cell_of_step(found: Predicted | None) -> str:
    return with_layout(milliseconds(found.seconds), found.layout) if found else NO


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def with_layout(figure: str, layout: Layout, *more: str) -> str:
    """The figure and, in brackets, over how many shards, in which order, where there are several, and `more`."""
    shards = [str(layout.shards)] if layout.shards > 1 else []
    order = [WITHIN if layout.pairs_within else APART] if layout.paired and layout.nodes > 1 else []
    told = ", ".join([*shards, *order, *more])
    return f"{figure} ({told})" if told else figure


def update_table() -> str:
    """Milliseconds per sample of the update batch, at equal batches per device; milliseconds of a step, at equal update batches; each
    in the fastest layout of the method."""
    rows = []
    for name, model in models().items():
        half = replace(model, batch=model.batch // 2)
        for devices, per_node, across, told in FEW_PLACES:
            where = (devices, per_node, across)
            all_differ, halves_alike = model.batch * devices, model.batch * devices // 2
            samples = {"adamw": all_differ, "sam": all_differ, "sampa": halves_alike}
            found = {method: fastest(model, method, *where) for method in samples}
            each = [per_sample(found[method], count) for method, count in samples.items()]
            at_equal = [*(fastest(half, method, *where) for method in ("adamw", "sam")), found["sampa"]]
            cells = [cell_of_method(step, milliseconds(step.seconds)) if step else NO for step in at_equal]
            rows.append([name, f"{devices}, {told}", f"{all_differ}, {halves_alike}", *each, *cells])
    head = ["model", "devices", "samples per update", "AdamW, per sample", "SAM, per sample", "SAMPa, per sample"]
    return as_table([*head, "AdamW, half batches", "SAM, half batches", "SAMPa"], rows)


def per_sample(found: Predicted | None, samples: int) -> str:
    return cell_of_method(found, f"{1000 * found.seconds / samples:#.3g}") if found else NO


def cell_of_method(found: Predicted, figure: str) -> str:
    """Of a method in whichever column is the fastest."""
    return with_layout(figure, found.layout, *(["shared"] if found.layout.shared else []))


def by_column(cell: Callable[[Model, Layout], str]) -> str:
    """A row for each model and place, a cell for the fastest layout of each column."""
    rows = []
    for name, model in models().items():
        for *where, told in FEW_PLACES:
            found = [fastest_of_column(model, column, *where) for column in COLUMNS]
            cells = [with_layout(cell(model, each.layout), each.layout) if each else NO for each in found]
            rows.append([name, f"{where[0]}, {told}", *cells])
    return as_table(["model", "devices", *COLUMNS], rows)


def memory_table() -> str:
    """GB per device."""

    def cell(model: Model, layout: Layout) -> str:
        planned = Planned(layout.method, layout.devices, layout.per_node, layout.shards, layout.shared)
        return f"{memory(model.run, planned).total / GB:.1f}"

    return by_column(cell)


def bytes_table() -> str:
    """GB per step: what a device sends, and what leaves a node."""

    def cell(model: Model, layout: Layout) -> str:
        sent, across = cost_model.sent_per_process(model.step, layout), sent_per_node(model.step, layout)[1]
        return f"{sent / GB:.2f}" + (f", {across / GB:.2f}" if layout.nodes > 1 else "")

    return by_column(cell)


def bucket_table() -> str:
    """Milliseconds of a step of SAMPa with whole weights, by the size of its buckets."""
    rows = []
    for name in ("BERT-base", "1 B"):
        model = models()[name]
        for devices, per_node, across, told in FEW_PLACES[1:]:
            layout = fastest_of_column(model, "SAMPa", devices, per_node, across).layout
            steps = [replace(model.step, bucket=size) for size in (cost_model.SAMPA_BUCKET, cost_model.DDP_BUCKET)]
            found = [Predicted(seconds_of_step(step, layout, NETWORKS[across]), layout) for step in steps]
            rows.append([name, f"{devices}, {told}", *map(cell_of_step, found)])
    return as_table(["model", "devices", "4 MiB, ms", "25 MiB, ms"], rows)


def needed_table() -> str:
    """Bandwidth of a node, from which on what it sends in backward is hidden behind it."""
    rows = []
    for name, model in models().items():
        for devices, per_node in ((2, 1), (16, PER_NODE), (64, PER_NODE), (1024, PER_NODE)):
            place = f"{devices}, one per node" if per_node == 1 else f"{devices}, {per_node} per node"
            found = [list(fitting(model, column, devices, per_node)) for column in ("AdamW, DDP", "SAMPa")]
            if all(found):
                rows.append([name, place, *(cell_of_bandwidth(model.step, layouts) for layouts in found)])
    return as_table(["model", "devices", "AdamW, DDP, GB/s", "SAMPa, GB/s"], rows)


def cell_of_bandwidth(step: Step, layouts: list[Layout]) -> str:
    """The least that one of them needs."""
    needed, layout = min(((bandwidth_needed(step, layout), layout) for layout in layouts), key=lambda each: each[0])
    return with_layout(f"{needed / GB:.1f}", layout)


def bandwidth_needed(step: Step, layout: Layout) -> float:
    across = sum(operation.across for operation in operations(step, layout) if operation.when == "backward")
    return across / (step.overlap * step.backward * step.pass_seconds)


def measured_tables() -> dict[str, str]:
    measured = json.loads(MEASURED.read_text())
    machine = rank_scaling.fit(measured)
    return {
        "links": rank_scaling.fit_table(measured, machine),
        "measured steps": rank_scaling.steps_table(measured, machine),
        "errors": rank_scaling.errors_table(measured, machine),
    }


def tables() -> dict[str, str]:
    """All of the page's, by the names that it gives them."""
    steps = {f"steps of {name}": step_table(name) for name in models()}
    return {
        **measured_tables(),
        "assumptions": assumptions(),
        "models": model_table(),
        "per node": per_node_table(),
        **steps,
        "needed": needed_table(),
        "buckets": bucket_table(),
        "updates": update_table(),
        "memory": memory_table(),
        "bytes": bytes_table(),
    }


# ---- The page and its picture ----

BLOCK = re.compile(r"<!-- table: (?P<name>[^>]*) -->\n\n(?P<table>.*?)\n\n<!-- end -->", re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Name and table of each."""
    yield from ((found["name"], found["table"]) for found in BLOCK.finditer(page))


def with_tables(page: str) -> str:
    """The page with the tables of today."""
    found = tables()
    return BLOCK.sub(lambda old: f"<!-- table: {old['name']} -->\n\n{found[old['name']]}\n\n<!-- end -->", page)


def draw() -> Figure:
    """Steps in units of a pass, by number of devices; a panel for each model. On one node there is no network: one line for both."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.9), sharey=True, layout="constrained")
    for axes, (name, model) in zip(panels, models().items(), strict=True):
        for method, color in COLORS.items():
            for across, style in (("InfiniBand", "-"), ("Ethernet", "--")):
                devices = DEVICES if across == "InfiniBand" else [n for n in DEVICES if n >= PER_NODE]
                found = {n: fastest(model, method.lower(), n, min(n, PER_NODE), across) for n in devices}
                places = [n for n, each in found.items() if each]
                heights = [found[n].seconds / model.step.pass_seconds for n in places]
                axes.plot(places, heights, style, color=color, marker="o", markersize=3, label=f"{method}, {across}")
        axes.axvline(PER_NODE, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(DEVICES[::3], map(str, DEVICES[::3]))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="devices, log scale", title=name)
        axes.spines[["top", "right"]].set_visible(False)
    heights = [1, 2, 4, 8, 16]
    panels[0].set_yticks(heights, map(str, heights))
    panels[0].set_ylabel("step / pass, log scale")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def write_picture(path: Path) -> None:
    """The same bytes each time."""
    drawn = StringIO()
    with plt.rc_context({"svg.hashsalt": "hf_sampa", "svg.fonttype": "path"}):
        figure = draw()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    # Some viewers refuse sizes in points.
    path.write_text(re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', drawn.getvalue(), count=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put tables and picture into the documentation")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
        write_picture(PICTURE)
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables().items()))


if __name__ == "__main__":
    main()
