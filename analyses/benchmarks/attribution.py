"""The grid of attributions of every state, beside one forward and backward of the same model.

A run of the donor, a forward and a backward of the base, and the donor's states remade inside both: the target is at
most 4 times a forward and backward of the base alone. Rounds are interleaved, so that the machine's drift hits all.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp import at, attribution_grid, gradients
from minimal_mamba import Mamba

from .cpu import make

TARGET = 4.0
SITES = ("ssm_state", "state_write", "state_read", "decay", "recurrent_state", "resid_post")


def measure(size: str = "S", batch: int = 8, length: int = 256, rounds: int = 7) -> dict[str, Any]:
    """Seconds of the grid of each site, and their ratio to a forward and backward; one thread, float32.

    Returns:
        "seconds" and "ratio": of each name the median over rounds; "range": least and most ratio of one round.
    """
    model = make(size)
    ids, donor = torch.randint(0, 512, (2, batch, length), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _seconds(model, ids, donor, rounds)
    finally:
        torch.set_num_threads(threads)
    unit = seconds["forward and backward"]
    ratios = {name: [t / u for t, u in zip(took, unit, strict=True)] for name, took in seconds.items()}
    return {
        "work": f"attribution {size}, batch {batch}, length {length}",
        "target": TARGET,
        "seconds": {name: statistics.median(took) for name, took in seconds.items()},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "range": {name: (min(found), max(found)) for name, found in ratios.items()},
    }


def _seconds(model: Mamba, ids: Tensor, donor: Tensor, rounds: int) -> dict[str, list[float]]:
    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    def grid(site: str) -> Callable[[], object]:
        return lambda: attribution_grid(model, ids, donor, site=site, metric=metric, backend="torch", progress=False)

    work: dict[str, Callable[[], object]] = {
        "forward and backward": lambda: gradients(model, ids, metric, at.embed(), backend="torch")
    }
    work |= {site: grid(site) for site in SITES}
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):  # one that warms up
        for name, do in work.items():
            begin = time.perf_counter()
            do()
            taken[name].append(time.perf_counter() - begin)
    return {name: times[1:] for name, times in taken.items()}
