"""The page about many devices: its tables and its picture are what the model gives today."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from statistics import median

import predictions
import pytest
import rank_scaling
import scaling_page
from cost_model import Layout, seconds_of_step
from matplotlib.text import Text
from predictions import NETWORKS, fastest, fastest_of_column, fitting, models

from hf_sampa.plan.layouts import Layout as Planned
from hf_sampa.plan.memory import memory


def test_the_tables_of_the_page_are_those_of_today():
    page = scaling_page.PAGE.read_text()
    assert dict(scaling_page.blocks(page)) == scaling_page.tables()
    assert scaling_page.with_tables(page) == page


def test_no_cell_of_a_prediction_is_empty():
    for name, table in scaling_page.tables().items():
        if name != "measured steps":  # nothing counts what AdamW sends
            assert "| |" not in table, name


def test_what_was_counted_on_ranks_is_what_the_model_says():
    measured = json.loads(scaling_page.MEASURED.read_text())
    machine = rank_scaling.fit(measured)
    assert [world["processes"] for world in measured["worlds"]] == [2, 4, 8]
    for world in measured["worlds"]:
        for method in ("sam_replicas", "sampa", "sampa_sharded"):
            sent = rank_scaling.predicted(world, machine, method)[1]
            assert world["steps"][method]["bytes_sent"] == pytest.approx(sent, rel=0.01), (world["processes"], method)


def test_the_picture_is_what_is_drawn_today(tmp_path):
    scaling_page.write_picture(tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_bytes() == scaling_page.PICTURE.read_bytes()


def test_the_picture_has_plain_sizes():
    root = re.search(r"<svg [^>]*>", scaling_page.PICTURE.read_text()).group()
    width, height = re.search(r' width="([\d.]+)" height="([\d.]+)"', root).groups()
    assert f'viewBox="0 0 {width} {height}"' in root


def test_the_picture_has_a_line_for_each_method_and_network():
    figure = scaling_page.draw()
    for axes, (name, model) in zip(figure.axes, predictions.models().items(), strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert axes.get_title() == name and len(lines) == 6
        for line in lines:
            method, across = line.get_label().split(", ")
            devices = int(line.get_xdata()[-1])
            expected = fastest(model, method.lower(), devices, 8, across).seconds / model.step.pass_seconds
            assert devices == 1024 and line.get_ydata()[-1] == expected
            assert (min(line.get_xdata()) == 8) == (across == "Ethernet" or (name, method) == ("7 B", "SAMPa"))
    assert {text.get_text() for text in figure.findobj(Text)} >= {"devices, log scale", "step / pass, log scale"}
    assert {axes.get_xscale() for axes in figure.axes} | {axes.get_yscale() for axes in figure.axes} == {"log"}


# ---- Layouts ----


def test_what_does_not_fit_is_not_predicted():
    seven = models()["7 B"]
    assert list(fitting(seven, "AdamW, DDP", 8, 8)) == []
    assert fastest_of_column(seven, "SAMPa, FSDP2", 4, 4, "Ethernet") is None  # two shards in each role
    assert list(fitting(seven, "SAMPa, FSDP2", 8, 8)) == [Layout("sampa", 8, 8, shards=4)]
    assert list(fitting(seven, "AdamW, FSDP2", 8, 8)) == [Layout("adamw", 8, 8, shards=s) for s in (4, 8)]


@pytest.mark.parametrize("name", predictions.COLUMNS)
def test_of_a_column_no_layout_is_faster(name):
    """All numbers of shards and both orders, one by one."""
    column = predictions.COLUMNS[name]
    for model in models().values():
        for *where, network, _ in scaling_page.PLACES:
            tried = []
            for shards in (2**n for n in range(1, 11)) if column.sharded else [1]:
                for within in (False, True) if column.method == "sampa" and where[0] > where[1] else [False]:
                    with suppress(ValueError):
                        tried.append(Layout(column.method, *where, shards, column.shared, within))
            fit = [layout for layout in tried if held_by(model, layout) <= 0.9 * 80e9]
            seconds = [seconds_of_step(model.step, layout, NETWORKS[network]) for layout in fit]
            found = fastest_of_column(model, name, *where, network)
            assert (found and found.seconds) == min(seconds, default=None)
            assert found is None or (found.layout in fit and seconds[fit.index(found.layout)] == found.seconds)


def held_by(model: predictions.Model, layout: Layout) -> int:
    fields = (layout.method, layout.devices, layout.per_node, layout.shards, layout.shared)
    return memory(model.run, Planned(*fields)).total


def test_sam_with_one_optimizer_fits_nowhere_else():
    for model in models().values():
        for devices, per_node, *_ in scaling_page.PLACES:
            whole = Layout("sam", devices, per_node)
            shared = memory(model.run, Planned("sam", devices, per_node, shared=True)).total
            assert shared > 0.9 * 80e9 or held_by(model, whole) <= 0.9 * 80e9


@pytest.mark.parametrize(
    ("layout", "more", "cell"),
    [
        (Layout("adamw", 16, 8), (), "1.0"),
        (Layout("adamw", 16, 8, shards=4), (), "1.0 (4)"),
        (Layout("sampa", 8, 8), (), "1.0"),
        (Layout("sampa", 16, 8), (), "1.0 (apart)"),
        (Layout("sampa", 16, 8, shards=2, pairs_within=True), (), "1.0 (2, within)"),
        (Layout("sampa", 8, 8, shared=True), ("shared",), "1.0 (shared)"),
    ],
)
def test_cells_name_their_layouts(layout, more, cell):
    assert scaling_page.with_layout("1.0", layout, *more) == cell


def test_both_orders_are_tried():
    assert predictions.orders(Planned("sampa", 16, 8)) == [
        Layout("sampa", 16, 8),
        Layout("sampa", 16, 8, pairs_within=True),
    ]
    for planned in (Planned("sampa", 8, 8), Planned("sampa", 8, 1), Planned("adamw", 24, 8)):
        assert predictions.orders(planned) == [Layout(planned.method, planned.devices, planned.per_node)]
    assert predictions.orders(Planned("sampa", 24, 8)) == [Layout("sampa", 24, 8, pairs_within=True)]


def test_the_passes_are_those_that_the_page_says():
    """6 d FLOP per token: BERT-base near the 26 ms that docs/cost.md has of AdamW's whole step."""
    bert = predictions.models()["BERT-base"].step
    assert bert.pass_seconds == pytest.approx(6 * bert.weights * 32 * 128 / (0.1 * 989e12))
    assert bert.pass_seconds == pytest.approx(0.026, rel=0.1)


# ---- What the page says of its tables ----


@pytest.fixture(scope="module")
def prose() -> str:
    """The page on one line."""
    return " ".join(scaling_page.PAGE.read_text().split())


def ratios(one: str, other: str, where: Iterable, names: Iterable[str] = ("BERT-base", "1 B", "7 B")) -> list[float]:
    """Of seconds, wherever both fit; each is a method, in its fastest layout, or a column."""

    def seconds(model: predictions.Model, name: str, place: list) -> float | None:
        found = (fastest if name in ("adamw", "sam", "sampa") else fastest_of_column)(model, name, *place)
        return found and found.seconds

    pairs = [[seconds(models()[m], name, place) for name in (one, other)] for m in names for *place, _ in where]
    return [first / second for first, second in pairs if first and second]


def between(found: Iterable[float], digits: int = 2) -> str:
    found = list(found)
    return f"{min(found):.{digits}f} to {max(found):.{digits}f}"


def places(network: str, least: int = 1, most: int = 1024) -> list:
    return [place for place in scaling_page.PLACES if place[3] == network and least <= place[0] <= most]


FAST = places("NVLink") + places("NVLink, InfiniBand")
FSDP = "SAMPa, FSDP2"


def test_what_is_said_of_fast_links(prose):
    four = [place for place in FAST if place[0] >= 4]
    assert f"Its step takes {between(ratios('sampa', 'adamw', four))} times as long as AdamW's fastest" in prose
    assert f"and {between(ratios('sampa', 'sam', four))} times as long as SAM's." in prose
    assert ratios(FSDP, "sampa", four) == [1.0] * len(ratios(FSDP, "sampa", four))  # it is the fastest
    two = places("NVLink", most=2)
    assert f"where SAMPa has whole weights, it takes {between(ratios('sampa', 'adamw', two))} times" in prose


def test_what_is_said_of_whole_weights_over_infiniband(prose):
    across, many = places("NVLink, InfiniBand"), places("NVLink, InfiniBand", least=64)
    found = ratios("SAMPa", "AdamW, DDP", across, ["1 B"])
    assert f"a step takes {between(found, 1)} times as long as AdamW's under DDP" in prose
    assert [found > 1 for found in ratios("SAMPa", "SAM, FSDP2", across, ["1 B"])] == [False, True, True, True]
    (bert,) = ratios("SAMPa", "AdamW, DDP", places("NVLink, InfiniBand", most=16), ["BERT-base"])
    found = between(ratios("SAMPa", "AdamW, DDP", many, ["BERT-base"]), 1)
    assert f"BERT-base it is {bert:.2f} times AdamW's on two nodes, and {found} times from 64 devices on" in prose


def test_what_is_said_of_ethernet(prose):
    nodes, single = places("NVLink, Ethernet"), places("Ethernet")
    of_nodes, of_single = (
        [between(ratios("sampa", other, where)) for other in ("adamw", "sam")] for where in (nodes, single)
    )
    assert (
        f"SAMPa takes {of_nodes[0]} times as long as AdamW's fastest, and {of_nodes[1]} times as long as SAM's"
        in prose
    )
    assert f"with one device per node {of_single[0]} and {of_single[1]}." in prose
    two = places("NVLink, Ethernet", most=16)
    whole = between(ratios("SAMPa", "AdamW, DDP", two))
    assert f"over Ethernet SAMPa takes {whole} times as long as AdamW under DDP" in prose
    assert f"of the fastest layouts SAMPa's takes {between(ratios('sampa', 'adamw', two))} times" in prose
    assert max(ratios("AdamW, FSDP2", "AdamW, DDP", two)) < 1 > max(ratios(FSDP, "SAMPa", two))


def test_what_is_said_of_shard_optimizer():
    assert min(ratios(f"{FSDP}, `shard_optimizer`", FSDP, scaling_page.PLACES)) >= 1
    over_ethernet = places("NVLink, Ethernet") + places("Ethernet")
    assert max(ratios("SAMPa, `shard_optimizer`", "SAMPa", over_ethernet)) < 1


def test_what_is_said_of_equal_work(prose):
    found = {"fast": [], "slow": []}
    for model in models().values():
        half = replace(model, batch=model.batch // 2)
        for *where, told in scaling_page.FEW_PLACES:
            sam, sampa = fastest(half, "sam", *where), fastest(model, "sampa", *where)
            if sam and sampa:
                found["slow" if told == "NVLink, Ethernet" else "fast"].append(sampa.seconds / sam.seconds)
    fast, slow = map(between, found.values())
    assert f"the model gives SAMPa {fast} times SAM's time; over Ethernet {slow}" in prose


def test_what_is_said_of_a_measured_pair(prose):
    measured = json.loads(scaling_page.MEASURED.read_text())
    pair, machine = measured["worlds"][0], rank_scaling.fit(measured)
    took = {method: pair["steps"][method]["seconds"] for method in ("adamw_ddp", "sampa")}
    adamw, sampa = (median(each) for each in took.values())
    model = [rank_scaling.predicted(pair, machine, method)[0] for method in took]
    assert f"SAMPa takes {sampa / adamw:.2f} times as long as AdamW under DDP" in prose
    assert f"where the model says {model[1] / model[0]:.2f};" in prose
    assert f"SAMPa's five rounds took {between(took['sampa'])} s per step" in prose and len(took["sampa"]) == 5
    assert max(took["sampa"]) - min(took["sampa"]) == pytest.approx(sampa - adamw, rel=0.1)
