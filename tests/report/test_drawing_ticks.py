"""Ticks of logarithmic axes."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from convexhead.report.drawing import PANEL, log_ticks, new_figure


@pytest.mark.parametrize(("value", "limits"), [(4.6e-4, (1e-4, 1e-3)), (3.0, (1.0, 10.0))])
def test_an_axis_of_less_than_a_decade_ends_at_decades(value, limits):
    with new_figure(PANEL) as figure:
        ax = figure.add_subplot()
        ax.plot([value, 1.1 * value], [value, 1.1 * value], "o")
        ax.set(xscale="log", yscale="log")
        log_ticks(ax.xaxis)
        log_ticks(ax.yaxis)
        assert ax.get_xlim() == pytest.approx(limits)
        assert ax.get_ylim() == pytest.approx(limits)
