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
from pathlib import Path

import cost_model
import matplotlib
import predictions
import rank_scaling
from cost_model import Layout, Step, operations, seconds_of_step, sent_per_node
from predictions import COLUMNS, NETWORKS, PER_NODE, Model, fastest, layout_of, models, orders, seconds
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
    """In units of d: what a node's processes send to one another, and to other nodes."""
    step = Step(weights=1, pass_seconds=0, number_bytes=1, sharded_bytes=1)
    rows = []
    for nodes in (1, 2, 4, 16):
        cells = [cell_of_node(step, Layout("adamw", nodes * PER_NODE, PER_NODE))]
        for fields in ({}, {"shared": True}, {"shards": 4}):
            found = orders(Planned("sampa", nodes * PER_NODE, PER_NODE, **fields))
            cells += [cell_of_node(step, layout) for layout in found]
            cells += ["the same"] * (2 - len(found))
        rows.append([str(nodes), *cells])
    ways = ("whole", "shared", "FSDP2")
    return as_table(
        [
            "nodes of 8",
            "AdamW, DDP",
            *(f"{way}, {order}" for way in ways for order in ("roles apart", "pairs within")),
        ],
        rows,
    )


def cell_of_node(step: Step, layout: Layout) -> str:
    within, across = sent_per_node(step, layout)
    return f"{within:.2f}, {across:.2f}"


def step_table(name: str) -> str:
    """Milliseconds of a step."""
    model, rows = models()[name], []
    for devices, per_node, across, told in PLACES:
        where = (devices, per_node, across)
        found = [seconds(model, column, *where) for column in COLUMNS]
        adamw, sampa = (fastest(model, method, *where) for method in ("adamw", "sampa"))
        ratio = f"{sampa / adamw:.2f}" if adamw and sampa else ""
        rows.append([str(devices), told, *(milliseconds(each) for each in found), ratio])
    return as_table(["devices", "links", *COLUMNS, "SAMPa / AdamW"], rows)


def milliseconds(found: float | None) -> str:
    return NO if found is None else f"{1000 * found:.1f}" if found < 0.1 else f"{1000 * found:,.0f}"


def update_table() -> str:
    """Milliseconds per sample of the update batch, at equal batches per device; milliseconds of a step, at equal update batches."""
    rows = []
    for name, model in models().items():
        half = replace(model, batch=model.batch // 2)
        for devices, per_node, across, told in FEW_PLACES:
            where = (devices, per_node, across)
            all_differ, halves_alike = model.batch * devices, model.batch * devices // 2
            samples = {"adamw": all_differ, "sam": all_differ, "sampa": halves_alike}
            each = [per_sample(fastest(model, method, *where), count) for method, count in samples.items()]
            at_equal = [fastest(half, method, *where) for method in ("adamw", "sam")]
            cells = [milliseconds(found) for found in (*at_equal, fastest(model, "sampa", *where))]
            rows.append([name, f"{devices}, {told}", f"{all_differ}, {halves_alike}", *each, *cells])
    head = ["model", "devices", "samples per update", "AdamW, per sample", "SAM, per sample", "SAMPa, per sample"]
    return as_table([*head, "AdamW, half batches", "SAM, half batches", "SAMPa"], rows)


def per_sample(found: float | None, samples: int) -> str:
    return NO if found is None else f"{1000 * found / samples:#.3g}"


def by_column(cell: Callable[[Model, Layout], str]) -> str:
    """A row for each model and number of devices, a cell for each column."""
    rows = []
    for name, model in models().items():
        for devices in (2, 8, 64):
            found = [layout_of(model, column, devices, min(devices, PER_NODE)) for column in COLUMNS]
            rows.append([name, str(devices), *(cell(model, layout) if layout else NO for layout in found)])
    return as_table(["model", "devices", *COLUMNS], rows)


def memory_table() -> str:
    """GB per device, and over how many shards."""

    def cell(model: Model, layout: Layout) -> str:
        planned = Planned(layout.method, layout.devices, layout.per_node, layout.shards, layout.shared)
        held = memory(model.run, planned).total / GB
        return f"{held:.1f}" + (f" ({layout.shards} shards)" if layout.shards > 1 else "")

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
            layout = layout_of(model, "SAMPa", devices, per_node)
            steps = [replace(model.step, bucket=size) for size in (cost_model.SAMPA_BUCKET, cost_model.DDP_BUCKET)]
            found = [milliseconds(seconds_of_step(step, layout, NETWORKS[across])) for step in steps]
            rows.append([name, f"{devices}, {told}", *found])
    return as_table(["model", "devices", "4 MiB, ms", "25 MiB, ms"], rows)


def needed_table() -> str:
    """Bandwidth of a node, from which on what it sends in backward is hidden behind it."""
    rows = []
    for name, model in models().items():
        for devices, per_node in ((2, 1), (16, PER_NODE), (64, PER_NODE), (1024, PER_NODE)):
            needed = [bandwidth_needed(model, column, devices, per_node) for column in ("AdamW, DDP", "SAMPa")]
            if None not in needed:
                place = f"{devices}, one per node" if per_node == 1 else f"{devices}, {per_node} per node"
                rows.append([name, place, *(f"{each / GB:.1f}" for each in needed)])
    return as_table(["model", "devices", "AdamW, DDP, GB/s", "SAMPa, GB/s"], rows)


def bandwidth_needed(model: Model, name: str, devices: int, per_node: int) -> float | None:
    layout, step = layout_of(model, name, devices, per_node), model.step
    if layout is None:
        return None
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
    """Steps in units of a pass, by number of devices; a panel for each model."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.9), sharey=True, layout="constrained")
    for axes, (name, model) in zip(panels, models().items(), strict=True):
        for method, color in COLORS.items():
            for across, style in (("InfiniBand", "-"), ("Ethernet", "--")):
                found = {n: fastest(model, method.lower(), n, min(n, PER_NODE), across) for n in DEVICES}
                places = [n for n, each in found.items() if each]
                heights = [found[n] / model.step.pass_seconds for n in places]
                axes.plot(places, heights, style, color=color, marker="o", markersize=3, label=f"{method}, {across}")
        axes.axvline(PER_NODE, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(DEVICES[::3], map(str, DEVICES[::3]))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="devices", title=name)
        axes.spines[["top", "right"]].set_visible(False)
    heights = [1, 2, 4, 8, 16]
    panels[0].set_yticks(heights, map(str, heights))
    panels[0].set_ylabel("step / pass")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def write_picture(path: Path) -> None:
    """The same bytes each time."""
    with plt.rc_context({"svg.hashsalt": "hf_sampa", "svg.fonttype": "path"}):
        figure = draw()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


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
