"""Patch sweeps: every cell is the run that one would do by hand."""

import importlib

import pytest
import torch
from helpers import names_drawn, slow, tiny

from interp import Grid, Set, at, heatmap, logit_diff, patch_grid, run
from interp.sweep.engine import run_cells
from kernels_bridge import BACKENDS
from minimal_mamba.errors import AddressError, EditError, InputError, MambascopeError

HERE = [name for name in ("reference", "torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]
EACH = pytest.mark.parametrize("backend", HERE)
MODEL = tiny(seed=6)
N = MODEL.config.n_layer
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (3, 6), generator=RNG) for _ in range(2))


def metric(logits):
    return logit_diff(logits, 3, 5)


def last(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


@EACH
@pytest.mark.parametrize("site", ["ssm_state", "recurrent_state", "resid_post", "state_read"])
def test_every_cell_is_a_run_under_that_edit(site, backend):
    grid = patch_grid(MODEL, IDS, DONOR, site=site, metric=metric, backend=backend, progress=False)
    assert grid.values.shape == (N, 6, 3)
    assert (grid.site, grid.layers, grid.positions) == (site, (0, 1, 2), tuple(range(6)))
    with torch.no_grad():
        for layer in range(N):
            for pos in range(6):
                place = getattr(at, site)(layer=layer, pos=pos)
                value = run(MODEL, DONOR, record=[place], backend=backend)[place]
                by_hand = last(run(MODEL, IDS, [Set(place, value)], backend=backend).logits)
                torch.testing.assert_close(grid.values[layer, pos], by_hand, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grid.base, last(run(MODEL, IDS, backend=backend).logits), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grid.donor, last(run(MODEL, DONOR, backend=backend).logits), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grid.effect(), grid.values - grid.base, rtol=0, atol=0)
    assert grid.effect().abs().max() > 1e-2


@pytest.mark.parametrize("lengths", [None, [6, 5, 4]])
def test_where_base_and_donor_are_still_the_same_nothing_runs(lengths, monkeypatch):
    """A value of the donor there is the base's; rows may part at different tokens, and the first that does decides."""
    module, ran = importlib.import_module("interp.sweep.patch"), []

    def counted(model, base, cells, *rest):
        ran.extend(i for i, cell in enumerate(cells) if cell)
        return run_cells(model, base, cells, *rest)

    monkeypatch.setattr(module, "run_cells", counted)
    donor, positions = IDS.clone(), [0, 1, 2, 3] if lengths is None else [0, -3, -2, -1]
    for row, pos in enumerate((3, 2, 2)):
        donor[row, pos] = (donor[row, pos] + 1) % 29
    grid = patch_grid(
        MODEL, IDS, donor, site="ssm_state", metric=metric, layers=[1], positions=positions, lengths=lengths,
        both=True, progress=False,
    )  # fmt: skip
    assert grid.noising is not None
    first = 2 if lengths is None else 1  # -3 of the shortest row is its token 1, of the others 3 and 2
    assert ran == [*range(first, 4)] * 2
    for made in (grid, grid.noising):
        assert torch.equal(made.values[:, :first], made.base.expand(1, first, -1))
    with torch.no_grad():
        for j, pos in enumerate(positions):
            place = at.ssm_state(layer=1, pos=pos)
            value = run(MODEL, donor, record=[place], lengths=lengths)[place]
            by_hand = run(MODEL, IDS, [Set(place, value)], lengths=lengths)
            torch.testing.assert_close(grid.values[0, j], metric(by_hand), rtol=1e-10, atol=1e-12)


def test_layers_together_and_chosen_positions():
    grid = patch_grid(
        MODEL,
        IDS,
        DONOR,
        site="recurrent_state",
        metric=metric,
        layers=[2, (0, 1, 2), [1, 0]],
        positions=[4, -6, 2],
        progress=False,
    )
    assert grid.layers == (2, (0, 1, 2), (1, 0))
    assert grid.positions == (4, 0, 2)
    with torch.no_grad():
        for i, group in enumerate(([2], [0, 1, 2], [0, 1])):
            for j, pos in enumerate((4, 0, 2)):
                place = at.recurrent_state(layer=group, pos=pos)
                value = run(MODEL, DONOR, record=[place])[place]
                torch.testing.assert_close(
                    grid.values[i, j], last(run(MODEL, IDS, [Set(place, value)]).logits), rtol=1e-10, atol=1e-12
                )
    # with the same last token the memory before it is all that differs: the ceiling is the donor, exactly
    donor = torch.cat([DONOR[:, :5], IDS[:, 5:]], 1)
    full = patch_grid(
        MODEL, IDS, donor, site="recurrent_state", metric=metric, layers=[range(N)], positions=[4], progress=False
    )
    torch.testing.assert_close(full.values[0, 0], full.donor, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(full.recovered(), torch.ones(1, 1, dtype=torch.float64))


def test_a_site_of_the_whole_model_has_one_row():
    grid = patch_grid(MODEL, IDS, DONOR, site="embed", metric=metric, progress=False)
    assert grid.values.shape == (1, 6, 3)
    with torch.no_grad():
        for pos in range(6):
            swapped = IDS.clone()
            swapped[:, pos] = DONOR[:, pos]  # patching an embedding is swapping its token
            torch.testing.assert_close(grid.values[0, pos], last(run(MODEL, swapped).logits), rtol=1e-10, atol=1e-12)


def test_padded():
    lengths = [6, 3, 4]
    grid = patch_grid(MODEL, IDS, DONOR, site="ssm_state", metric=metric, lengths=lengths, progress=False)
    assert grid.positions == (0, 1, 2)
    for i, n in enumerate(lengths):
        r = slice(i, i + 1)
        alone = patch_grid(
            MODEL, IDS[r, :n], DONOR[r, :n], site="ssm_state", metric=metric, positions=[0, 1, 2], progress=False
        )
        torch.testing.assert_close(grid.values[:, :, r], alone.values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grid.base[r], alone.base, rtol=1e-10, atol=1e-12)


def test_negative_positions_count_from_each_rows_own_end():
    lengths = [6, 3, 5]
    for backend in ("reference", "torch"):
        # 1 and -2 are one place in the row of 3 and two in the others
        grid = patch_grid(
            MODEL, IDS, DONOR, site="resid_post", metric=metric, positions=[-1, 1, -2], lengths=lengths,
            backend=backend, progress=False,
        )  # fmt: skip
        assert grid.positions == (-1, 1, -2)
        with torch.no_grad():
            for layer in range(N):
                for column, pos in enumerate(grid.positions):
                    place = at.resid_post(layer=layer, pos=pos)
                    value = run(MODEL, DONOR, record=[place], lengths=lengths, backend=backend)[place]
                    out = run(MODEL, IDS, [Set(place, value)], lengths=lengths, backend=backend)
                    by_hand = logit_diff(out, 3, 5)
                    torch.testing.assert_close(grid.values[layer, column], by_hand, rtol=1e-10, atol=1e-12)
        # the last layer's last token is all that the logits are read from
        torch.testing.assert_close(grid.values[N - 1, 0], grid.donor, rtol=1e-12, atol=1e-12)
    same = patch_grid(MODEL, IDS, DONOR, site="u", metric=metric, positions=[-1], lengths=[4, 4, 4], progress=False)
    assert same.positions == (3,)


def test_layers_and_positions_as_at_takes_them():
    def sweep(**kwargs):
        grid = patch_grid(MODEL, IDS.tolist(), DONOR.tolist(), site="u", metric=metric, progress=False, **kwargs)
        assert grid.values.shape == (len(grid.layers), len(grid.positions), 3)
        return grid.layers, grid.positions

    assert sweep(layers=1, positions=1) == ((1,), (1,))
    assert sweep(layers=-1, positions=-1) == ((2,), (5,))
    assert sweep(layers=slice(0, 2), positions=slice(-2, None)) == ((0, 1), (4, 5))
    assert sweep(layers=[slice(0, 2), 2], positions=range(1, 3)) == (((0, 1), 2), (1, 2))
    assert sweep(layers=0, positions=slice(1, None), lengths=[6, 3, 4]) == ((0,), (1, 2))
    assert sweep(layers=0, positions=-3, lengths=[6, 3, 4]) == ((0,), (-3,))


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_labels_of_a_heat_map(pyplot):
    grid = patch_grid(MODEL, IDS, DONOR, site="u", metric=metric, positions=[0, 1], progress=False)
    ax = heatmap(grid, tokens=["a", "b"], rows=["x", "y", "z"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x", "y", "z"]
    for labels in ({"tokens": ["a"]}, {"tokens": list("abc")}, {"rows": ["x", "y"]}):
        with pytest.raises(InputError, match=r"labels for the grid's [23]; give one for each"):
            heatmap(grid, **labels)


def grid_of(effects):
    """A sweep of 4 rows with these effects, (layers, positions); the donor's is 1."""
    values = torch.as_tensor(effects, dtype=torch.float64)[..., None].expand(-1, -1, 4)
    base = torch.zeros(4, dtype=torch.float64)
    return Grid(values, base, base + 1, "u", tuple(range(len(values))), tuple(range(values.shape[1])))


def test_a_heat_map_is_scaled_by_its_finite_cells_and_hatches_the_others(pyplot):
    nan = float("nan")
    ax = heatmap(grid_of([[0.0, nan, -0.5], [0.25, 0.0, float("inf")]]))
    ax.figure.canvas.draw()
    assert ax.images[0].get_clim() == (-0.5, 0.5)
    (hatched,) = ax.collections
    centres = [p.get_extents().get_points().mean(0).tolist() for p in hatched.get_paths()]
    assert centres == [[1.0, 0.0], [2.0, 1.0]] and hatched.get_hatch()
    grey, zero = hatched.get_facecolor()[0], ax.images[0].cmap(0.5)
    assert max(abs(a - b) for a, b in zip(grey, zero, strict=True)) > 0.1
    assert "hatched: not finite" in ax.figure.axes[1].get_ylabel()
    ax = heatmap(grid_of([[nan, nan]]), normalise=False, colorbar=False)
    ax.figure.canvas.draw()
    assert len(ax.collections[0].get_paths()) == 1  # of two neighbours
    assert "hatched" not in heatmap(grid_of([[0.5, 0.2]])).figure.axes[1].get_ylabel()


@pytest.mark.parametrize("colorbar", [True, False])
def test_where_nothing_moves_a_heat_map_is_white(colorbar, pyplot):
    ax = heatmap(grid_of([[0.0, 0.0]]), colorbar=colorbar)
    ax.figure.canvas.draw()
    image = ax.images[0]
    assert image.get_clim() == (-1, 1)
    assert image.cmap(image.norm(0.0)) == image.cmap(0.5)


def test_the_colour_bar_names_the_runs_so_that_it_is_true_of_both_directions(pyplot):
    grid = patch_grid(MODEL, IDS, DONOR, site="u", metric=metric, both=True, progress=False)
    for one in (grid, grid.noising):  # of which 0 is the base run, and the donor run
        assert heatmap(one).figure.axes[1].get_ylabel() == "moved (0 own run, 1 other)"


@pytest.mark.parametrize(("limit", "ends"), [(1.0, "neither"), (0.4, "max"), (0.2, "both")])
def test_the_arrows_of_a_colour_bar_say_which_end_is_passed(limit, ends, pyplot):
    assert heatmap(grid_of([[0.5, -0.3]]), limit=limit).images[0].colorbar.extend == ends


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_colour_scale_ends_above_zero(limit, pyplot):
    with pytest.raises(InputError, match=r"a colour scale ends above 0. Leave limit out"):
        heatmap(grid_of([[0.5]]), limit=limit)


@pytest.mark.parametrize("size", [None, *slow(((3.3, 2.5),)), (6.8, 3.0)])
def test_names_that_do_not_fit_are_left_out(size, pyplot):
    grid = grid_of(torch.linspace(-1, 1, 40)[:, None].expand(-1, 64))

    def ax():
        return None if size is None else pyplot.subplots(figsize=size, constrained_layout=True)[1]

    drawn = heatmap(grid, ax=ax())
    across, up = names_drawn(drawn, "x"), names_drawn(drawn, "y")
    assert across == [str(i) for i in range(0, 64, int(across[1]))] and int(across[1]) in (5, 10)
    assert up == [str(i) for i in range(0, 40, int(up[1]))] and len(up) > 3
    tokens = [f"{i}-incomprehensible" for i in range(64)]
    drawn = heatmap(grid, ax=ax(), tokens=tokens)
    across = names_drawn(drawn, "x")
    shown = [f"{token[:11]}…" for token in tokens]
    assert across == shown[:: shown.index(across[1])]
    assert drawn.get_xticklabels()[0].get_size() >= 5.5
    assert len(across) == 64 if size == (6.8, 3.0) else len(across) >= 16
    drawn.figure.set_size_inches(14, 3)  # it is the drawing that they fit
    assert len(names_drawn(drawn, "x")) == 64


def test_few_names_are_all_there_and_as_large_as_others(pyplot):
    ax = heatmap(grid_of([[0.5] * 12] * 4), tokens=[f"word{i}" for i in range(12)])
    assert len(names_drawn(ax, "x")) == 12 and names_drawn(ax, "y") == list("0123")
    assert ax.get_xticklabels()[0].get_size() == ax.get_yticklabels()[0].get_size() == pyplot.rcParams["font.size"]


def test_tokens_are_text_and_can_be_seen(pyplot):
    tokens = ["$$", "$x$", "a$b_c", r"\frac", "\n", "", " ", " the", "\x00", "x\u200b", "Ġthe"]
    seen = ["$$", "$x$", "a$b_c", r"\frac", r"'\n'", "''", "' '", "' the'", r"'\x00'", r"'x\u200b'", "Ġthe"]
    ax = heatmap(grid_of([[0.5] * len(tokens)] * 4), tokens=tokens)
    ax.figure.canvas.draw()
    for name, text in zip(ax.get_xticklabels(), seen, strict=True):
        plain = ax.text(0, 0, text, parse_math=False, rotation=90, size=name.get_size())
        assert name.get_window_extent().height == pytest.approx(plain.get_window_extent().height), text


def test_recovered_and_its_error_by_hand():
    values = torch.tensor([[[1.0, 4.0]], [[0.0, 2.0]]], dtype=torch.float64)  # 2 layers, 1 position, 2 rows
    grid = Grid(values, torch.tensor([0.0, 2.0]).double(), torch.tensor([4.0, 4.0]).double(), "u", (0, 1), (0,))
    # effects (1, 2) and (0, 0); gaps (4, 2), mean 3. Recovered: mean(1, 2) / 3 = 0.5, and 0.
    assert grid.recovered().flatten().tolist() == [0.5, 0.0]
    # residuals 1 - 0.5 * 4 = -1 and 2 - 0.5 * 2 = 1: standard deviation sqrt 2, over sqrt 2 rows, over 3
    assert grid.recovered_error().flatten().tolist() == pytest.approx([1 / 3, 0.0])


def test_the_standard_error_is_the_spread_of_repeated_samples():
    rng = torch.Generator().manual_seed(0)
    base = torch.zeros(400, 200, dtype=torch.float64)
    donor = 2 + torch.randn(400, 200, generator=rng, dtype=torch.float64)
    values = 0.3 * donor + 0.5 * torch.randn(400, 200, generator=rng, dtype=torch.float64)
    grids = [Grid(v[None, None], b, d, "u", (0,), (0,)) for v, b, d in zip(values, base, donor, strict=True)]
    estimates = torch.stack([g.recovered()[0, 0] for g in grids])
    claimed = torch.stack([g.recovered_error()[0, 0] for g in grids]).mean()
    assert estimates.mean().item() == pytest.approx(0.3, abs=0.01)
    assert estimates.std().item() == pytest.approx(claimed.item(), rel=0.12)


def test_errors():
    def sweep(*args, **kwargs):
        return patch_grid(
            MODEL, *(args or (IDS, DONOR)), **({"site": "u", "metric": metric, "progress": False} | kwargs)
        )

    cases = [
        (EditError, {"site": "ssm_stat"}, "site='ssm_stat' is no site. Did you mean 'ssm_state'"),
        (EditError, {"site": "embed", "layers": [0]}, "embed is no part of a layer"),
        (EditError, {"layers": []}, "name at least one"),
        (EditError, {"std": 2.0}, "std=2.0, seed=0 are of source='noise'; source='donor' draws nothing"),
        (EditError, {"source": "zero", "seed": 1}, "std=1.0, seed=1 are of source='noise'"),
        (AddressError, {"layers": [3]}, r"layer=3 does not exist here: there are indices 0\.\.2"),
        (AddressError, {"layers": [(0, 0)]}, "names the same index twice"),
        (AddressError, {"positions": [6]}, r"pos=6 does not exist here: there are indices 0\.\.5"),
        (AddressError, {"positions": []}, "at least one int"),
        (
            AddressError,
            {"positions": [5], "lengths": [6, 3, 6]},
            r"pos=5 does not exist here: there are indices 0\.\.2",
        ),
        (
            AddressError,
            {"positions": [-4], "lengths": [6, 3, 6]},
            r"pos=-4 does not exist here: there are indices 0\.\.2",
        ),
        (AddressError, {"positions": slice(-2, None), "lengths": [6, 3, 6]}, r"lengths \[6, 3, 6\], so the slice -2:"),
        (MambascopeError, {"metric": lambda x: x[:, -1]}, r"one number a row; this one gave \(3, 32\)"),
    ]
    for error, kwargs, text in cases:
        with pytest.raises(error, match=text):
            sweep(**kwargs)
    with pytest.raises(InputError, match=r"ids \(3, 6\) and donor_ids \(3, 5\) differ in shape"):
        sweep(IDS, DONOR[:, :5])
    same = sweep(IDS, IDS)
    assert not same.effect().abs().max() > 1e-12
    assert same == same and same != sweep(IDS, IDS) and len({same, same}) == 1
    with pytest.raises(InputError, match="the donor's metric does not differ from the base's"):
        same.recovered()
    with pytest.raises(InputError, match="a standard error needs at least 2 rows; there is 1"):
        sweep(IDS[:1], DONOR[:1]).recovered_error()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gap_of_a_few_steps_of_16_bits_is_a_gap(dtype):
    base, donor = torch.full((2,), 15.0, dtype=dtype), torch.full((2,), 12.0, dtype=dtype)
    grid = Grid(torch.full((1, 1, 2), 13.5, dtype=dtype), base, donor, "ssm_state", (0,), (0,))
    assert grid.recovered().item() == 0.5


def test_shares_of_a_gap_that_is_rounding_are_refused():
    """Each pair both ways round: the mean gap is zero, but for what a sum in float32 leaves of it."""
    drawn, values, noise = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0))
    base, donor = drawn.flatten(), (drawn.flip(0) * (1 + 1e-6 * noise)).flatten()
    grid = Grid(values.reshape(1, 1, -1), base, donor, "u", (0,), (0,))
    assert 0 < (donor - base).mean().abs() < 1e-6
    for shares in (grid.recovered, grid.recovered_error, grid.interval):
        with pytest.raises(InputError, match="nothing to normalise by"):
            shares()
    small = Grid(values.reshape(1, 1, -1), base, base + 1e-4, "u", (0,), (0,))
    assert small.recovered().isfinite().all()
