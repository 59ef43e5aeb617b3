"""Sweeps on the packages' own Python code in float32: every cell errs as little as the readable model's run of it."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from helpers import tiny
from stand_ins import register
from torch import Tensor

from interp import Scale, Set, at, logit_diff, patch_grid, run, sweep
from kernels_bridge.fused import load
from minimal_mamba import Mamba

KERNELS = dataclasses.replace(load(), name="fused[on a CPU]", device="cpu")
SINGLE = tiny(seed=5).float()
EXACT = Mamba(SINGLE.config).double()
EXACT.load_state_dict(SINGLE.state_dict())
N, L = SINGLE.config.n_layer, 6
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (2, L), generator=RNG) for _ in range(2))


@pytest.fixture(autouse=True)
def substituted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(KERNELS, patch)
        yield


def score(logits: Tensor) -> Tensor:
    return logit_diff(logits, 3, 5)


@torch.no_grad()
def by_hand(cells: list, lengths: list[int] | None = None) -> Tensor:
    return torch.stack([score(run(EXACT, IDS, c, lengths=lengths, backend="reference", last_only=True).logits)
                        for c in cells])  # fmt: skip


@pytest.mark.parametrize("site", ["ssm_state", "state_read", "recurrent_state", "resid_post", "u"])
def test_a_grid(site: str) -> None:
    grid = patch_grid(SINGLE, IDS, DONOR, site=site, metric=score, backend="fused", progress=False)
    places = [getattr(at, site)(layer=i, pos=p) for i in range(N) for p in range(L)]
    with torch.no_grad():
        donor = run(EXACT, DONOR, record=places, backend="reference")
    want = by_hand([Set(a, donor[a]) for a in places]).view(N, L, -1)
    assert (grid.values - want).abs().max() <= 1e-5 * want.abs().max() < 1e-2 * (want - grid.base).abs().max()


def test_edits_that_depend_on_what_they_meet_on_a_padded_batch() -> None:
    lengths = [6, 4]
    sites = ("ssm_state", "decay", "state_write", "conv_state", "dt")
    cells = [Scale(getattr(at, s)(layer=i, pos=p), 1.5) for s in sites for i in range(N) for p in (0, -2)]
    found = sweep(SINGLE, IDS, cells, score, lengths=lengths, backend="fused", progress=False)
    want = by_hand(cells, lengths)
    assert found.backend == "fused[on a CPU]"
    assert (found.values - want).abs().max() <= 1e-5 * want.abs().max()
