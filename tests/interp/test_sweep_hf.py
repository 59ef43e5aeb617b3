"""Cells of patch grids against HF's model: a forward hook for the residual stream, one more line in its scan for the
state."""

import random

import pytest
import torch
from helpers import WideTorch, needs_hf_scan, tiny

from interp import at, patch_grid, run

transformers = pytest.importorskip("transformers")
from transformers.models.mamba import modeling_mamba  # noqa: E402

from analyses.benchmarks.sweeps import hf_resid, hf_state, hf_twin, scan_replaced  # noqa: E402

L, B = 11, 3
RNG = torch.Generator().manual_seed(0)


@pytest.fixture
def pair(monkeypatch):
    needs_hf_scan()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(modeling_mamba, "torch", WideTorch())
    model = tiny(seed=4, pad_vocab_size_multiple=1)
    hf = hf_twin(model)
    ids, donor_ids = (torch.randint(0, 29, (B, L), generator=RNG) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(hf(ids).logits, run(model, ids).logits, rtol=1e-11, atol=1e-11)
        with scan_replaced({}, model.config.n_layer):  # the replaced scan is HF's own
            torch.testing.assert_close(hf(ids).logits, run(model, ids).logits, rtol=1e-11, atol=1e-11)
    return model, hf, ids, donor_ids


@torch.no_grad()
def test_fifty_random_cells(pair):
    model, hf, ids, donor_ids = pair
    n = model.config.n_layer
    for site, make in (("resid_post", hf_resid), ("ssm_state", hf_state)):
        grid = patch_grid(model, ids, donor_ids, site=site, metric=lambda x: x[:, -1, 3], progress=False)
        where = getattr(at, site)
        made = run(model, donor_ids, record=[where(layer=i) for i in range(n)])
        cell = make(hf, ids, {i: made[where(layer=i)] for i in range(n)})
        places = random.Random(0).sample([(i, p) for i in range(n) for p in range(L)], 25)
        for layer, pos in places:
            torch.testing.assert_close(grid.values[layer, pos], cell(layer, pos)[:, 3], rtol=1e-10, atol=1e-10)
        assert grid.effect()[:-1].abs().amax(-1).min() > 1e-6  # no cell is idle
