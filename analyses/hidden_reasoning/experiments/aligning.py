"""In how many dimensions of a memory the running value is, by distributed alignment search (`interp.alignment`).

Base and donor are prompts that were drawn apart, as for the hand-overs. After some operation, k dimensions of a memory
of all layers, as one space, are swapped for the donor's; the target is what the base's remaining operations make of the
donor's value. The subspace is found on some pairs and scored on others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp import Swapped, align, at
from minimal_mamba import Mamba

from ..task import Task
from .handover import apart, go_on
from .results import Results

DIMENSIONS = (1, 2, 3, 4, 6, 8)
WITH_CONTROLS = (4,)  # of these k also random subspaces, and a search for shuffled answers
SEARCHED = 64  # principal components that are searched


def aligning(
    results: Results, model: Mamba, task: Task, *, site: str, num_steps: int, step: int, n: int, seeds: int,
    dimensions: Sequence[int] = DIMENSIONS, epochs: int = 30, progress: bool = True,
) -> None:  # fmt: skip
    """Search at each number of dimensions, for each seed with pairs of its own, part by part.

    Args:
        site: the memory. step: after so many operations, at the word behind the echo. n: pairs, of which 30 % are held
            out.
    Cost: up to `epochs` times a forward and a backward of the pairs for each number of dimensions and seed, and twice
        that for those with controls.
    """
    for seed in range(seeds):
        for k in dimensions:
            one = partial(_search, model, task, site, num_steps, step, k, n, seed, epochs, progress)
            results.part(f"{k} dimensions, seed {seed}", one)


def unrelated(task: Task, num_steps: int, step: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Base and donor, what the base's remaining operations make of the donor's value after `step`, and that position.

    Returns:
        ids, donor_ids (n, l) up to the answer; targets (n,); the position of the word behind the step's echo.
    """
    base, donor, ids, others, first = apart(task, num_steps, n, seed)
    value = task.values(donor.operations.numpy())[:, step - 1]
    targets = task.value_ids[torch.from_numpy(go_on(value, base.operations.numpy(), step, task))]
    return ids, others, targets, first + 2 * step - 1


def _search(
    model: Mamba, task: Task, site: str, num_steps: int, step: int, k: int, n: int, seed: int, epochs: int,
    progress: bool,
) -> dict[str, Any]:  # fmt: skip
    ids, others, targets, pos = unrelated(task, num_steps, step, n, seed)
    place = getattr(at, site)(layer=slice(None), pos=pos)
    found = align(model, ids, others, targets, place, k, dims=SEARCHED, epochs=epochs, seed=seed,
                  seeds=int(k in WITH_CONTROLS), progress=progress)  # fmt: skip
    plain = {"held_out": _plain(found.held_out), "fitted": _plain(found.fitted)}
    controls = {name: [_plain(one) for one in several] for name, several in found.controls.items()}
    return {**plain, "controls": controls, "spread": found.spread, "losses": found.losses}


def _plain(one: Swapped) -> dict[str, Any]:
    right = round(one.accuracy * one.rows)
    return {"right": right, "of": one.rows, "interval": one.interval, "log_prob": one.log_prob}
