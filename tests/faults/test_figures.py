"""The table of faults is what tests reported."""

from types import SimpleNamespace

from tests.faults.figures import PROPERTY, table


def test_figures_of_a_name_are_added_up():
    reports = [
        SimpleNamespace(when="call", user_properties=[(PROPERTY, ["flips", 24, 24]), ("other", 1)]),
        SimpleNamespace(when="call", user_properties=[(PROPERTY, ["flips", 10, 9])]),
        SimpleNamespace(when="teardown", user_properties=[(PROPERTY, ["flips", 10, 9])]),
    ]
    assert [line.split() for line in table(reports)[1:]] == [["flips", "34", "33"]]


def test_without_figures_there_is_no_table():
    assert table([SimpleNamespace(when="call", user_properties=[])]) == []


def test_a_figure_is_reported(figure, request):
    figure("figures reported", 1, 1)
    assert request.node.user_properties == [(PROPERTY, ["figures reported", 1, 1])]
    request.node.user_properties.clear()  # not a fault
