"""What a sweep takes of the base run: its memory before any position."""

import pytest
import torch
from helpers import tiny

from interp import at, run
from interp.sweep.base import Base
from kernels_bridge import BACKENDS

HERE = [name for name in ("reference", "torch", "compiled") if not BACKENDS[name].missing(torch.device("cpu"))]
MODEL = tiny(seed=6)
N, L = MODEL.config.n_layer, 12
IDS = torch.randint(0, 29, (3, L), generator=torch.Generator().manual_seed(0))
CALLS = {
    "one after the other": ([[[0] * 3, [1] * 3, [4] * 3], [[4] * 3, [9] * 3]], [1, 3]),
    "each row its own": ([[[0, 2, 1], [3, 3, 3], [4, 9, 3]], [[5, 9, 10]]], [1, 2]),
    "all rows as far on": ([[[0, 2, 1], [3, 5, 4]], [[6, 8, 7]]], [4]),
    "back again": ([[[7] * 3], [[2] * 3, [3] * 3], [[1, 2, 0]]], []),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lengths", [None, [12, 11, 12]])
@pytest.mark.parametrize("backend", HERE)
@torch.no_grad()
def test_the_memory_before_any_positions_is_the_runs(backend, lengths, name):
    calls, later = CALLS[name]
    base = Base(MODEL, IDS, lengths, backend)
    base.read(0)
    full = run(MODEL, IDS, record=[at.ssm_state(), at.conv_state()], backend="reference")
    blank = MODEL.initial_state(3)

    def of_run(site, layer, row, pos):
        """After the tokens before `pos`."""
        return getattr(blank, site)[layer][row] if pos == 0 else full[getattr(at, site)()][layer, row, pos - 1]

    for starts in calls:
        memory, after = base.before(torch.tensor(starts), later)
        for layer in range(N):
            for c, start in enumerate(starts):
                for row, pos in enumerate(start):
                    for site, found in zip(("ssm_state", "conv_state"), memory[layer], strict=True):
                        torch.testing.assert_close(found[c][row], of_run(site, layer, row, pos), rtol=1e-11, atol=1e-12)
                    for more in later:
                        if pos + more <= (L if lengths is None else lengths[row]):
                            want = of_run("ssm_state", layer, row, pos + more)
                            torch.testing.assert_close(after[more][layer][c][row], want, rtol=1e-11, atol=1e-12)
