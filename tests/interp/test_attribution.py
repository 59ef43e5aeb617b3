"""Attribution against full gradients and recordings, exact patches, finite differences and integrals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from stand_ins import STAND_INS, register
from torch.utils._python_dispatch import TorchDispatchMode

from interp import Add, Scale, Set, Zero, accuracy, at, attribution_grid, gradients, logit_diff, patch_grid, run
from interp.run import MetricError
from kernels_bridge import torch_scan
from minimal_mamba.errors import AddressError, EditError, InputError, NotReached
from minimal_mamba.sites import ADDRESSABLE

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
ROOT = Path(__file__).parents[2]
SCAN = ["decay", "state_write", "ssm_state", "state_read"]
MODEL = tiny(seed=4)
with torch.no_grad():  # one on which few nodes integrate along a line: embeddings that layers and norms hardly bend
    SMOOTH = tiny(seed=4, tie_embeddings=False)
    SMOOTH.backbone.embedding.weight.mul_(0.2).add_(1)
    for layer in SMOOTH.backbone.layers:
        layer.mixer.out_proj.weight.mul_(0.1)
L = 7
DRAW = torch.Generator().manual_seed(0)
IDS, DONOR, PREFIX, OTHER = (torch.randint(0, 29, (3, L), generator=DRAW) for _ in range(4))
LENGTHS = [4, 7, 5]


def metric(logits):
    return logit_diff(logits[:, -1], 3, 5) + 0.5 * logits[:, -1, 7] ** 2 / 10


def spread(logits):
    """A metric of every position, so that no cell is beside the point."""
    weight = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (torch.tanh(logits) * weight.to(logits.dtype)).sum((1, 2))


def grid(model, ids, donor, **kwargs):
    return attribution_grid(model, ids, donor, progress=False, **kwargs)


def where(site, **fields):
    return getattr(at, site)(**(fields | ({"layer": slice(None)} if ADDRESSABLE[site].layered else {})))


def by_hand(site, measure, keep=None, edits=(), state=None, donor_state=None, **kwargs):
    """The same from full tensors of the readable model: gradient times difference, summed."""
    place = where(site)
    found = gradients(MODEL, IDS, measure, place, edits, "reference", state, **kwargs)[place]
    with torch.no_grad():
        base = run(MODEL, IDS, edits, place, "reference", state, **kwargs)[place]
        donor = run(MODEL, DONOR, (), place, "reference", donor_state or state, **kwargs)[place]
    product = found * (donor - base)
    if "lengths" in kwargs:
        product = product.nan_to_num()  # recordings are NaN where a row has no position
    product = product if ADDRESSABLE[site].layered else product[None]
    features = ADDRESSABLE[site].features
    gone = [3 + i for i, axis in enumerate(features) if axis != keep]
    return product.sum(gone).movedim(1, -1)


def close(got, want, tolerance=1e-10):
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("site", list(ADDRESSABLE))
def test_it_is_gradient_times_difference(site, backend):
    close(grid(MODEL, IDS, DONOR, site=site, metric=spread, backend=backend).effect(), by_hand(site, spread))


@BOTH
@pytest.mark.parametrize("keep", ["e", "n", None])
@pytest.mark.parametrize("site", SCAN)
def test_an_axis_can_be_kept(site, keep, backend):
    got = grid(MODEL, IDS, DONOR, site=site, metric=spread, keep=keep, backend=backend)
    close(got.effect(), by_hand(site, spread, keep))
    whole = grid(MODEL, IDS, DONOR, site=site, metric=spread, backend=backend)
    close(got.effect().sum(2) if keep else got.effect(), whole.effect())
    assert got.parts == (tuple(f"{keep} {i}" for i in range(MODEL.config.size(keep))) if keep else None)
    assert got.values.shape == (3, L, *([len(got.parts)] if keep else []), 3)


@BOTH
@pytest.mark.parametrize("site", [*SCAN, "conv_state", "u", "embed", "resid_post", "recurrent_state"])
def test_padded_rows_are_exact(site, backend):
    kwargs = {"metric": metric, "backend": backend}
    got = grid(MODEL, IDS, DONOR, site=site, lengths=LENGTHS, positions=[0, 3, -2, -1], **kwargs)
    for row, length in enumerate(LENGTHS):
        alone = grid(MODEL, IDS[row : row + 1, :length], DONOR[row : row + 1, :length], site=site, **kwargs)
        columns = [0, 3, length - 2, length - 1]
        close(got.effect()[..., row : row + 1], alone.effect()[:, columns])
    every = grid(MODEL, IDS, DONOR, site=site, lengths=LENGTHS, **kwargs)
    assert every.positions == (0, 1, 2, 3)
    close(every.effect(), by_hand(site, metric, lengths=LENGTHS)[:, :4])


@pytest.mark.parametrize("blocks", [1, 2, 64])
@pytest.mark.parametrize("site", [*SCAN, "conv_state", "recurrent_state"])
def test_edits_in_the_base_cut_the_scan_and_change_nothing_else(site, blocks, monkeypatch):
    monkeypatch.setattr(torch_scan, "cut", lambda b, l, e, n, threads: (2, min(l, blocks), 7))
    torch.manual_seed(0)
    edits = [
        Set(at.ssm_state(layer=1, pos=3), torch.randn(24, 5, dtype=torch.float64)),
        Add(at.state_read(layer=0, pos=[0, 6]), torch.randn(24, 5, dtype=torch.float64)),
        Scale(at.decay(layer=2, pos=[2, 3]), torch.tensor(0.5)),
        Zero(at.state_write(layer=0, pos=2), rows=[1]),
        Add(at.u(layer=1, pos=4), torch.tensor(0.3)),
        Zero(at.conv_state(layer=2, pos=1)),
    ]
    for keep in (None, "e", "n") if site in SCAN else (None, "e"):
        got = grid(MODEL, IDS, DONOR, site=site, metric=spread, keep=keep, edits=edits, backend="torch")
        close(got.effect(), by_hand(site, spread, keep, edits))


@BOTH
@pytest.mark.parametrize("site", [*SCAN, "conv_state", "recurrent_state", "gate"])
def test_from_a_memory(site, backend):
    with torch.no_grad():
        state, other = (run(MODEL, ids, keep_state=True, lengths=[7, 7, 7]).state for ids in (PREFIX, OTHER))
    for donor_state in (None, other):
        kwargs = {"state": state, "donor_state": donor_state}
        got = grid(MODEL, IDS, DONOR, site=site, metric=spread, backend=backend, **kwargs)
        assert got.positions == tuple(range(7, 14))
        close(got.effect(), by_hand(site, spread, **kwargs))
        part = grid(MODEL, IDS, DONOR, site=site, metric=spread, backend=backend, positions=[12, -7], **kwargs)
        assert part.positions == (12, 7)
        close(part.effect(), got.effect()[:, [5, 0]])


@pytest.mark.parametrize("length", [1, 2, 63])
def test_other_lengths(length):
    ids, donor = (torch.randint(0, 29, (2, length), generator=DRAW) for _ in range(2))
    for site in ("ssm_state", "decay"):
        got, want = (
            grid(MODEL, ids, donor, site=site, metric=spread, backend=b).effect() for b in ("torch", "reference")
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if length > 1:
        assert got.abs().max() > 1e-4


@pytest.mark.parametrize("site", [*SCAN, "recurrent_state", "x"])
def test_it_is_the_slope_of_a_step_toward_the_donor(site):
    """Finite differences of runs under an edit that goes a small part of the way."""
    got = grid(MODEL, IDS, DONOR, site=site, metric=spread).effect()
    eps = 1e-6
    for layer, pos in ((0, 2), (1, 6), (2, 0)):
        place = getattr(at, site)(layer=layer, pos=pos)
        with torch.no_grad():
            base, donor = run(MODEL, IDS, record=place), run(MODEL, DONOR, record=place)
            way = eps * (donor[place] - base[place])
            up, down = (spread(run(MODEL, IDS, Add(place, s * way)).logits) for s in (1, -1))
        torch.testing.assert_close(got[layer, pos], (up - down) / (2 * eps), rtol=1e-6, atol=1e-6)


def linear_readout():
    """A model whose logits are linear in its last residual stream: with so large an eps its last norm only scales."""
    model = tiny(seed=4)
    norm = model.backbone.norm_f
    with torch.no_grad():
        norm.eps = 1e30
        norm.weight.mul_(1e15)
    return model


def linear(logits):
    weight = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    return (logits * weight).sum((1, 2))


@BOTH
def test_it_equals_exact_patching_where_the_metric_is_linear_in_the_edited_layer(backend):
    model = linear_readout()
    kwargs = {"metric": linear, "backend": backend, "progress": False, "layers": [2]}
    sites = [*SCAN, "B", "C", "y", "skip", "ssm_out", "gate", "gated", "mixer_out", "resid_post"]
    for site in [*sites, "dt", "conv_state"]:
        got, want = (f(model, IDS, DONOR, site=site, **kwargs) for f in (attribution_grid, patch_grid))
        if site in sites:
            close(got.values, want.values)
        else:  # controls, in which the layer is not linear
            assert (got.values - want.values).abs().max() > 1e-3
        close(torch.stack([got.base, got.donor]), torch.stack([want.base, want.donor]))
    below = {**kwargs, "site": "ssm_state", "layers": [1]}  # another control: not linear through the layer above
    got, want = (f(model, IDS, DONOR, **below) for f in (attribution_grid, patch_grid))
    assert (got.values - want.values).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("edits", [(), [Scale(at.y(layer=1), torch.tensor(0.5)), Zero(at.ssm_state(layer=0, pos=2))]])
@pytest.mark.parametrize("padded", [False, True])
def test_integrated_gradients_of_the_embedding_are_complete(padded, edits, backend):
    extra = {"lengths": LENGTHS} if padded else {}
    ids, donor = IDS, DONOR
    if padded:  # the grid has the positions that every row has: only those may differ
        donor = torch.cat([DONOR[:, :4], IDS[:, 4:]], 1)
    measure = metric if padded else spread
    kwargs = {"site": "embed", "metric": measure, "edits": edits, "backend": backend, **extra}
    with torch.no_grad():
        place = at.embed(pos=slice(4 if padded else None))
        swap = Set(place, run(SMOOTH, donor, record=place, **extra)[place])
        end = measure(run(SMOOTH, ids, [swap, *edits], last_only=padded, **extra).logits)
    errors = []
    for steps in (1, 4, 24):
        got = grid(SMOOTH, ids, donor, steps=steps, **kwargs)
        errors.append((got.effect().sum((0, 1)) - (end - got.base)).abs().max())
    assert (end - got.base).abs().min() > 1e-3
    assert errors[0] > 1e-3 and errors[1] < errors[0] and errors[2] < 1e-8
    if not edits:
        torch.testing.assert_close(end, got.donor)


@BOTH
@pytest.mark.parametrize("site", ["ssm_state", "decay", "conv_state", "resid_post", "recurrent_state"])
def test_along_the_embeddings_gradients_are_averaged(site, backend):
    """EAP-IG: the mean gradient on the line between the embeddings, times the difference of the two ends."""
    place, ends = where(site), []
    with torch.no_grad():
        for ids in (IDS, DONOR):
            ends.append(run(MODEL, ids, record=[place, at.embed()], backend="reference"))
    want = 0.0
    for node in (0.5 - 12**-0.5, 0.5 + 12**-0.5):  # Gauss and Legendre, two nodes
        line = ends[0][at.embed()] * (1 - node) + ends[1][at.embed()] * node
        found = gradients(MODEL, IDS, spread, place, Set(at.embed(), line), backend="reference")[place]
        product = found * (ends[1][place] - ends[0][place])
        want = want + product.flatten(3).sum(3).movedim(1, -1) / 2
    got = grid(MODEL, IDS, DONOR, site=site, metric=spread, steps=2, backend=backend)
    close(got.effect(), want)
    plain = grid(MODEL, IDS, DONOR, site=site, metric=spread, backend=backend)
    assert (got.effect() - plain.effect()).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("site", ["ssm_state", "x", "recurrent_state"])
def test_integrated_gradients_of_a_cell_sum_to_its_exact_effect(site, backend):
    kwargs = {"site": site, "metric": metric, "layers": [0, 2], "positions": [2, -1], "backend": backend}
    kwargs |= {"lengths": LENGTHS, "progress": False}
    exact = patch_grid(SMOOTH, IDS, DONOR, **kwargs)
    got = attribution_grid(SMOOTH, IDS, DONOR, steps=12, path="cell", keep="e", **kwargs)
    assert got.values.shape == (2, 2, 24, 3) and (got.layers, got.positions) == (exact.layers, exact.positions)
    close(got.effect().sum(2), exact.effect(), 1e-8)
    rough = attribution_grid(SMOOTH, IDS, DONOR, **kwargs)
    assert (rough.effect() - exact.effect()).abs().max() > 1e-3


def test_a_grid_of_attributions_is_a_grid():
    got = grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, layers=slice(1, 3), positions=[5, 0])
    whole = grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread)
    assert (got.site, got.layers, got.positions) == ("ssm_state", (1, 2), (5, 0))
    close(got.values, whole.values[1:][:, [5, 0]])
    close(got.recovered(), got.effect().mean(-1) / (got.donor - got.base).mean())
    with torch.no_grad():
        close(torch.stack([got.base, got.donor]), torch.stack([spread(run(MODEL, i).logits) for i in (IDS, DONOR)]))
    with torch.inference_mode():
        again = grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, steps=1)
    close(again.values, grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, steps=1).values)
    assert not whole.values.requires_grad and all(p.grad is None for p in MODEL.parameters())


def test_single_precision_and_frozen_weights():
    single = tiny(seed=4, dtype=torch.float32).requires_grad_(False)
    for site in (*SCAN, "recurrent_state", "u"):
        got = grid(single, IDS, DONOR, site=site, metric=spread).effect()
        want = grid(MODEL, IDS, DONOR, site=site, metric=spread).effect()
        assert got.dtype == torch.float32
        assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (MetricError, "without a gradient", {"metric": lambda logits: accuracy(logits, 3)}),
        (MetricError, "one number a row", {"metric": lambda logits: logits.sum()}),
        (EditError, "ssm_state", {"site": "ssm_stat"}),
        (InputError, "keep one of them", {"keep": "d"}),
        (InputError, "keep one of them", {"site": "recurrent_state", "keep": "n+k"}),
        (InputError, "steps=-1", {"steps": -1}),
        (InputError, "steps=True", {"steps": True}),
        (InputError, "'embed' or 'cell'", {"path": "cells"}),
        (InputError, "several together", {"layers": [(0, 1)]}),
        (InputError, "differ in shape", {"donor_ids": DONOR[:, :5]}),
        (AddressError, "pos", {"positions": [7]}),
        (EditError, "cannot be remade", {"steps": 2, "edits": Zero(at.decay(layer=0, pos=1)), "backend": "torch"}),
    ],
)
def test_what_cannot_be_meant_is_refused(error, match, kwargs):
    kwargs = {"site": "ssm_state", "metric": spread, "donor_ids": DONOR, **kwargs}
    with pytest.raises(error, match=match):
        attribution_grid(MODEL, IDS, progress=False, **kwargs)


def test_memories_at_different_places_are_refused():
    with torch.no_grad():
        state = run(MODEL, IDS, keep_state=True, lengths=LENGTHS).state
        whole = run(MODEL, IDS, keep_state=True).state
    for kwargs in ({"state": state}, {"donor_state": whole}):
        with pytest.raises(InputError, match="stand at positions"):
            grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, **kwargs)
    with pytest.raises(AddressError, match="from 7 on"):
        grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, state=whole, positions=[3])


@pytest.mark.parametrize("site", [*SCAN, "recurrent_state"])
def test_the_fused_backend_gives_it_too(site, monkeypatch):
    """With stand-ins for the kernels; a block that nothing else touches is still opened."""
    register(STAND_INS, monkeypatch)
    got = grid(MODEL, IDS, DONOR, site=site, metric=spread, layers=[0, 2], backend="fused")
    close(got.effect(), by_hand(site, spread)[[0, 2]])


def test_a_scan_that_passes_over_a_move_is_not_believed(monkeypatch):
    monkeypatch.setattr("minimal_mamba.layer_tap.LayerTap.toward", lambda self: None)
    with pytest.raises(NotReached, match="passed over a move"):
        grid(MODEL, IDS, DONOR, site="ssm_state", metric=spread, backend="torch")


class Largest(TorchDispatchMode):
    """Sees every tensor that is made, in the backward too."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.numel())
        return out


@pytest.mark.parametrize("site", SCAN)
def test_no_tensor_is_as_large_as_the_states(site, monkeypatch):
    monkeypatch.setattr(torch_scan, "cut", lambda b, l, e, n, threads: (b, min(l, 8), e))
    ids, donor = (torch.randint(0, 29, (2, 80), generator=DRAW) for _ in range(2))
    model, states = tiny(d_state=20), 2 * 80 * 24 * 20
    for backend, steps in (("torch", 0), ("torch", 1), ("reference", 0)):
        with Largest() as seen:
            grid(model, ids, donor, site=site, metric=spread, backend=backend, steps=steps)
        if backend == "torch":
            assert seen.size < states / 2
        else:  # the control
            assert seen.size >= states


LONG, WIDTH, N = 1024, 64, 128
TRAJECTORY = LONG * 2 * WIDTH * N * 4  # bytes of (1, l, e, n) in float32: 64 MiB
SCRIPT = f"""
import torch
from minimal_mamba import Mamba, MambaConfig, at
from interp import attribution_grid, gradients

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def metric(logits):
    return logits[:, -1, 0]

torch.set_num_threads(1)
torch.manual_seed(0)
model = Mamba(MambaConfig(d_model={WIDTH}, n_layer=1, vocab_size=50, d_state={N}))
ids, donor = torch.randint(0, 50, (2, 1, {LONG}))
gradients(model, ids, metric, at.embed(), backend="torch")  # warm: what a forward and a backward need
before = peak()
grid = attribution_grid(model, ids, donor, site="ssm_state", metric=metric, backend="torch", progress=False)
assert grid.effect().any()
print(peak() - before)
assert gradients(model, ids, metric, at.ssm_state(layer=0), backend="torch")[at.ssm_state(layer=0)].any()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_the_grid_of_states_never_holds_the_states():
    """The peak of a process of its own: the grid, then the whole gradient as the control."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "16384"  # else the heap's holes are measured, not its use
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grids, whole = map(int, done.stdout.split())
    assert grids < TRAJECTORY / 4  # measured 0.14: mostly the donor's states, of one block and at the start of each
    assert whole > TRAJECTORY * 0.9  # the measure sees a trajectory where there is one


def test_a_line_of_embeddings_and_edits_of_them():
    """An edit behind them is done along the line; one of themselves would be done twice at the base's end."""
    edits = Scale(at.resid_pre(layer=0), 0.5)
    how = {"site": "embed", "metric": metric, "steps": 24, "progress": False}
    found = attribution_grid(SMOOTH, IDS, DONOR, edits=edits, **how)
    with torch.no_grad():
        whole = metric(run(SMOOTH, DONOR, edits).logits) - metric(run(SMOOTH, IDS, edits).logits)
    torch.testing.assert_close(found.effect().sum((0, 1)), whole, rtol=1e-6, atol=1e-8)
    with pytest.raises(EditError, match="Edit resid_pre of layer 0"):
        attribution_grid(SMOOTH, IDS, DONOR, edits=Scale(at.embed(), 0.5), **how)
    assert attribution_grid(SMOOTH, IDS, DONOR, edits=Scale(at.embed(), 0.5), **how | {"steps": 0})
