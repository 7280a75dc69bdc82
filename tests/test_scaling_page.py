"""The page about many devices: its tables and its picture are what the model gives today."""

from __future__ import annotations

import json

import predictions
import pytest
import rank_scaling
import scaling_page
from cost_model import Layout
from matplotlib.text import Text

from hf_sampa.plan.layouts import Layout as Planned


def test_the_tables_of_the_page_are_those_of_today():
    page = scaling_page.PAGE.read_text()
    assert dict(scaling_page.blocks(page)) == scaling_page.tables()
    assert scaling_page.with_tables(page) == page


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


def test_the_picture_has_a_line_for_each_method_and_network():
    figure = scaling_page.draw()
    for axes, (name, model) in zip(figure.axes, predictions.models().items(), strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert axes.get_title() == name and len(lines) == 6
        for line in lines:
            method, across = line.get_label().split(", ")
            devices = int(line.get_xdata()[-1])
            expected = predictions.fastest(model, method.lower(), devices, 8, across) / model.step.pass_seconds
            assert devices == 1024 and line.get_ydata()[-1] == expected
    assert {text.get_text() for text in figure.findobj(Text)} >= {"devices", "step / pass"}


def test_what_does_not_fit_is_not_predicted():
    seven = predictions.models()["7 B"]
    assert predictions.layout_of(seven, "AdamW, DDP", 8, 8) is None
    assert predictions.layout_of(seven, "SAMPa, FSDP2", 4, 4) is None  # two shards in each role
    assert predictions.layout_of(seven, "SAMPa, FSDP2", 8, 8) == Layout("sampa", 8, 8, shards=4)
    assert predictions.layout_of(seven, "AdamW, FSDP2", 4, 4) == Layout("adamw", 4, 4, shards=4)


def test_both_orders_are_tried():
    assert predictions.orders(Planned("sampa", 16, 8)) == [
        Layout("sampa", 16, 8),
        Layout("sampa", 16, 8, pairs_within=True),
    ]
    for planned in (Planned("sampa", 8, 8), Planned("sampa", 8, 1), Planned("adamw", 16, 8)):
        assert len(predictions.orders(planned)) == 1


def test_the_passes_are_those_that_the_page_says():
    """6 d FLOP per token: BERT-base near the 26 ms that docs/cost.md has of AdamW's whole step."""
    bert = predictions.models()["BERT-base"].step
    assert bert.pass_seconds == pytest.approx(6 * bert.weights * 32 * 128 / (0.1 * 989e12))
    assert bert.pass_seconds == pytest.approx(0.026, rel=0.1)
