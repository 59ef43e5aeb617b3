"""The agreement of two sweeps against scipy's correlations, and the picture of it."""

import math
import re
from dataclasses import replace

import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from interp import Grid, agreement
from interp.plots import agreement_scatter
from minimal_mamba.errors import InputError

BASE = torch.zeros(40, dtype=torch.float64)


def grid(values):
    return Grid(values, BASE, BASE + 1, "ssm_state", (0, 1), (0, 1, 2))


def draw(seed):
    return torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_correlations_are_those_of_scipy():
    exact = draw(0)
    estimate = (0.6 * exact + 0.5 * draw(1)).mul(2).round() / 2  # with ties
    estimate[0, 0], exact[0, 0] = 0, 1e-9  # nothing happens here
    found = agreement(grid(estimate), grid(exact))
    alive = torch.ones(2, 3, 40, dtype=torch.bool)
    alive[0, 0] = False
    x, y = estimate[alive], exact[alive]
    assert found.count == 200
    assert found.pearson[0] == pytest.approx(pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman[0] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert found.error[0] == pytest.approx(((x - y).norm() / y.norm()).item())
    for value, low, high in (found.pearson, found.spearman, found.error):
        assert low < value < high and high - low < 0.3


def test_what_nothing_was_drawn_for_has_no_interval():
    """One example drawn again is itself: that is no certainty."""
    exact, estimate = draw(0), draw(0) + 0.5 * draw(1)
    one = [Grid(v[..., :1], BASE[:1], BASE[:1] + 1, "ssm_state", (0, 1), (0, 1, 2)) for v in (estimate, exact)]
    for found in (agreement(*one), agreement(grid(estimate), grid(exact), draws=0)):
        for value, low, high in (found.pearson, found.spearman, found.error):
            assert math.isfinite(value) and math.isnan(low) and math.isnan(high)


def test_an_estimate_that_is_exact_has_no_error_and_one_of_half_the_size_has():
    exact = grid(draw(0))
    found = agreement(exact, exact)
    assert found.error == (0, 0, 0) and found.pearson == pytest.approx((1, 1, 1))
    half = agreement(grid(exact.values / 2), exact)
    assert half.pearson == pytest.approx((1, 1, 1)) and half.error == pytest.approx((0.5, 0.5, 0.5))


def test_grids_of_other_cells_are_refused():
    one = grid(draw(0))
    with pytest.raises(InputError, match="differ"):
        agreement(one, replace(one, layers=(0, 2)))
    with pytest.raises(InputError, match="no cell"):
        agreement(grid(0 * draw(0)), grid(0 * draw(0)))


def test_the_picture_has_every_cell_and_the_line_of_equality():
    import matplotlib

    matplotlib.use("Agg")
    exact, estimate = grid(draw(0)), grid(3 * draw(1))
    ax = agreement_scatter(estimate, exact, draws=10, label="plain")
    points, line = ax.lines
    assert sorted(points.get_xdata()) == sorted(exact.values.flatten().tolist())
    assert sorted(points.get_ydata()) == sorted(estimate.values.flatten().tolist())
    assert points.get_markersize() >= 1.5
    assert line.get_xy1() == (0, 0) and line.get_xy2() == (1, 1)
    assert ax.get_xlim() == ax.get_ylim() and ax.get_xlim()[1] >= estimate.values.abs().max()
    assert ax.get_xlabel() == "exact effect (nats)" and ax.texts[0].get_text().startswith("plain: r ")
    one = [replace(g, values=g.values[..., :1], base=g.base[:1], donor=g.donor[:1]) for g in (estimate, exact)]
    assert re.fullmatch(r"r -?\d\.\d\d, ρ -?\d\.\d\d", agreement_scatter(*one).texts[0].get_text())  # no interval
