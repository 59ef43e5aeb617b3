"""Sweeps on the fused backend's logic: every cell is the readable model's run of that edit, in float64 on stand-ins."""

from collections.abc import Iterator

import pytest
import torch
from helpers import LAST, tiny
from stand_ins import STAND_INS, register
from torch import Tensor

from interp import (
    Add,
    Knockout,
    Mean,
    Scale,
    Set,
    Zero,
    at,
    knockout,
    knockout_grid,
    logit_diff,
    patch_grid,
    run,
    sweep,
)
from kernels_bridge import resolve
from minimal_mamba.scan import READABLE
from minimal_mamba.sites import ADDRESSABLE
from minimal_mamba.tap import NO_TAP

MODEL = tiny(seed=6)
N, B, L = MODEL.config.n_layer, 3, 7
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (B, L), generator=RNG) for _ in range(2))


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(STAND_INS, patch)
        yield


def score(logits: Tensor) -> Tensor:
    return logit_diff(logits, 3, 5)


def everywhere(logits: Tensor) -> Tensor:
    return logits.tanh().mean((1, 2)) + logits[:, 0, 3]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def by_hand(cells: list, metric=score, lengths: list[int] | None = None) -> Tensor:
    last = lengths is not None
    return torch.stack([metric(run(MODEL, IDS, c, lengths=lengths, backend="reference", last_only=last).logits)
                        for c in cells])  # fmt: skip


@pytest.mark.parametrize("lengths", [None, [7, 4, 6]])
def test_every_site_layer_and_position(lengths: list[int] | None) -> None:
    places = [
        getattr(at, site)(pos=pos, **({"layer": layer} if ADDRESSABLE[site].layered else {}))
        for site in ADDRESSABLE for layer in (range(N) if ADDRESSABLE[site].layered else [0]) for pos in (0, 2, -1)
    ]  # fmt: skip
    with torch.no_grad():
        donor = run(MODEL, DONOR, record=places, lengths=lengths, backend="reference")
    cells = [[Set(a, donor[a])] for a in places]
    metrics = {"score": score, "everywhere": everywhere}
    found = sweep(MODEL, IDS, cells, metrics, lengths=lengths, backend="fused", progress=False)
    assert found["score"].backend == "fused[stand-ins]"
    base = by_hand([[]], score, lengths)[0]
    for name, metric in metrics.items():
        close(found[name].values, by_hand(cells, metric, lengths))
    close(found["score"].base, base)
    assert ((found["score"].values - base).abs().amax(1) > 1e-3).sum() > 0.7 * len(cells)  # they do something


@pytest.mark.parametrize("site", ["ssm_state", "state_read", "recurrent_state", "resid_post", "conv_state", "dt"])
def test_a_grid(site: str) -> None:
    grid = patch_grid(MODEL, IDS, DONOR, site=site, metric=score, both=True, backend="fused", progress=False)
    for back, (ids, other) in ((grid, (IDS, DONOR)), (grid.noising, (DONOR, IDS))):
        with torch.no_grad():
            for layer in range(N):
                for pos in range(L):
                    place = getattr(at, site)(layer=layer, pos=pos)
                    value = run(MODEL, other, record=[place], backend="reference")[place]
                    out = run(MODEL, ids, Set(place, value), backend="reference", last_only=True)
                    close(back.values[layer, pos], score(out.logits))


def test_edits_of_every_kind() -> None:
    """Those that depend on what they meet, of parts, of some rows, of several places, and of the whole batch."""
    cells = [
        [Scale(at.ssm_state(layer=1, pos=2), 0.5)], [Zero(at.decay(layer=0, pos=3))],
        [Add(at.state_write(layer=2, pos=1), 1.0)],
        [Set(at.ssm_state(layer=0, pos=4, n=[0, 2]), 0.3)], [Set(at.ssm_state(layer=1, pos=3), 0.3, rows=[0, 2])],
        [Scale(at.state_read(layer=2, pos=slice(2, 5)), 2.0)], [Mean(at.u(layer=1, pos=2))], [Scale(at.dt(), 1.1)],
        [Set(at.ssm_state(layer=0, pos=1), 0.1), Scale(at.ssm_state(layer=0, pos=5), 2.0), Zero(at.z(layer=1, pos=4))],
        [Scale(at.conv_state(layer=1, pos=[0, 4]), 2.0)], [Set(at.ssm_state(layer=2, pos=slice(None)), 0.2)], [],
    ]  # fmt: skip
    for lengths in (None, [7, 7, 7]):
        found = sweep(MODEL, IDS, cells, score, lengths=lengths, backend="fused", progress=False)
        close(found.values, by_hand(cells, score, lengths))


def test_ragged_starts_and_little_memory() -> None:
    lengths = [7, 4, 6]
    cells = [[Scale(getattr(at, site)(layer=i, pos=p), 1.5)] for site in ("ssm_state", "x") for i in range(N)
             for p in (-1, 1, -3, 0)]  # fmt: skip
    want = by_hand(cells, score, lengths)
    close(sweep(MODEL, IDS, cells, score, lengths=lengths, backend="fused", progress=False).values, want)
    tight = sweep(MODEL, IDS, cells, score, lengths=lengths, backend="fused", memory=3 << 17, progress=False)
    assert len(tight.groups) > 3
    close(tight.values, want)


def test_a_grid_of_knockouts() -> None:
    found = knockout_grid(MODEL, IDS, score, target=-2, through="scan", backend="fused", progress=False)
    for row, layer in enumerate(found.layers):
        for column, source in enumerate(found.sources):
            want = knockout(MODEL, IDS, [Knockout(source, -2, layer, "scan")], backend="reference")
            close(found.values[row, column], score(want.logits).detach())


@torch.no_grad()
def test_the_block_gives_each_rows_last_token_alone_if_asked() -> None:
    mixer, memory = MODEL.backbone.layers[0].mixer, tuple(part[0] for part in (
        MODEL.initial_state(B).ssm_state, MODEL.initial_state(B).conv_state))  # fmt: skip
    ops = resolve("fused").begin(MODEL, True, False)
    x, sizes = torch.randn(B, L, MODEL.config.d_model, generator=RNG, dtype=torch.float64), torch.tensor([7, 4, 6])
    want, _ = mixer(x, memory, None, NO_TAP, READABLE)
    for mask, ends in ((None, torch.full((B,), L)), (torch.arange(L) < sizes[:, None], sizes)):
        found, after = ops.block(mixer, x, memory, mask, LAST)
        close(found[:, 0], want[torch.arange(B), ends - 1])
        assert all(part.isnan().all() for part in after)  # the kernels give none back
        close(ops.block(mixer, x, memory, mask, NO_TAP)[0], want)
