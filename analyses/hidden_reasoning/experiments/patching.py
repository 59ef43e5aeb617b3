"""Where the hidden value is, by putting another run's memory in, and whether it is needed there, by taking it away.

Pairs differ in one operation and are the same after it. A share of 0 is the base run's answer, 1 the donor's; errors
are one standard error over the pairs. In the control the two operations lead to the same value, so that what is put in
carries another operation and not another value: the answer should stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp import Edit, Grid, Mean, Zero, at, logit_diff, patch_grid, run
from interp import accuracy as right
from minimal_mamba import Mamba

from ..task import Pairs, Task, pairs
from .accuracy import Score, fresh
from .channels import channels
from .handover import handover, shifted
from .probing import places
from .results import Results

STREAM = 3  # keeps the seeds of pairs apart from those of training and evaluation
SITES = ("ssm_state", "conv_state", "recurrent_state", "resid_post")
Layers = int | Sequence[int]


def words(task: Task, num_steps: int, differ: int | None = None) -> tuple[str, ...]:
    """What a prompt's positions are, before the final answer; the operation that differs, from 0, is starred."""
    steps = [f"op{i + 1}" + ("*" if i == differ else "") for i in range(num_steps)]
    if task.name == "direct":
        return tuple(steps)
    if task.name == "masked":
        return ("hide", *steps, "[\\n]", str(task.start), *[w for step in steps for w in (step, "[_]")][:-1])
    return (*steps, "[\\n]", *[w for step in steps for w in (step, "[v]")], "[\\n]")


def kinds(task: Task) -> dict[str, dict[str, Any]]:
    """The kinds of pairs of a task, as arguments of `pairs`: the value differs, and the control, where none does."""
    if task.name != "doublethink":
        return {"value": {}, "control": {"same_value": True}}
    return {
        "value": {"overt": "same"},
        "overt": {"same_value": True, "overt": "differ"},
        "control": {"same_value": True, "overt": "same"},
    }


def drawn(task: Task, kind: str, num_steps: int, differ: int, n: int, seed: int) -> Pairs:
    """Pairs of a kind."""
    return pairs(num_steps, n, [STREAM, seed], which_step=differ, task=task, **kinds(task)[kind])


def metrics(found: Pairs) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name: logit(donor's answer) - logit(base's) in nats; whether the answer is no longer the base's, 0 or 1."""
    return {
        "gap": lambda logits: logit_diff(logits, found.donor_answer, found.base_answer),
        "flip": lambda logits: 1 - right(logits, found.base_answer),
    }


def packed(grids: dict[str, Grid], same: bool) -> dict[str, Any]:
    """A map, ready for JSON: layers, positions, share and its error (not of a control), share of answers that flip."""
    flip = grids["flip"]
    n = flip.values.shape[-1]
    mean = flip.values.mean(-1)
    made: dict[str, Any] = {
        "layers": flip.layers,
        "positions": flip.positions,
        "flip": mean,
        "flip_error": (mean * (1 - mean) / n).sqrt(),
    }
    if not same:
        made |= {"share": grids["gap"].recovered(), "error": grids["gap"].recovered_error()}
    return made


def maps(
    model: Mamba, found: Pairs, site: str, layers: Sequence[Layers] | None = None, same: bool = False, **more: Any
) -> dict[str, Any]:
    """Patch a site at every layer and position."""
    rows: Any = None if layers is None else list(layers)
    grids = patch_grid(
        model, found.base_ids, found.donor_ids, site=site, metric=metrics(found), layers=rows, **more,
    )  # fmt: skip
    return packed(grids, same)


def windows(n_layer: int) -> list[tuple[int, ...]]:
    """All runs of neighbouring layers, the whole model among them."""
    return [tuple(range(i, j)) for i in range(n_layer) for j in range(i + 1, n_layer + 1)]


def necessity(model: Mamba, found: Pairs, site: str, layers: Sequence[Layers], progress: bool) -> dict[str, Any]:
    """The share of right answers when a place has the mean over the pairs' base prompts instead of its own value."""
    grid = patch_grid(
        model, found.base_ids, site=site, metric=lambda logits: right(logits, found.base_answer),
        layers=list(layers), source="mean", progress=progress,
    )  # fmt: skip
    mean = grid.values.mean(-1)
    error = (mean * (1 - mean) / grid.values.shape[-1]).sqrt()
    return {"layers": grid.layers, "positions": grid.positions, "right": mean, "error": error,
            "base": grid.base.mean().item()}  # fmt: skip


@torch.no_grad()
def without(model: Mamba, task: Task, num_steps: int, n: int, seed: int) -> dict[str, Any]:
    """Right answers, and right words of the echo, when one of the memories does nothing in all layers, at all words.

    Without the SSM state no token reads it (`state_read` is 0, and y_t is D u_t alone); without the conv state each has
    the mean over the prompts in place of the words before. The echo repeats the operations, the text before it given.
    """
    found = fresh(num_steps, n, seed, task)
    l = int(found.answer_at[0]) + 1  # all rows are as long
    ids, every = found.ids[:, :l], range(model.config.n_layer)
    taken: dict[str, list[Edit]] = {
        "nothing": [],
        "SSM state": [Zero(at.state_read(layer=i)) for i in every],
        "conv state": [Mean(at.conv_state(layer=i, pos=slice(0, l))) for i in every],
    }
    echo = torch.tensor([] if task.name == "direct" else places(task, num_steps), dtype=torch.long)
    made = {}
    for what, edits in taken.items():
        guess = run(model, ids, edits).logits[..., : model.config.vocab_size].argmax(-1)  # (b, l)
        answers, words = guess[:, -1] == found.answer_ids, guess[:, echo - 1] == ids[:, echo]
        made[what] = {
            name: asdict(Score(hits.numel(), int(hits.sum()), None, False))
            for name, hits in (("answers", answers), ("echo", words))
            if hits.numel()
        }
    return made


def patch(
    results: Results, model: Mamba, task: Task, *, num_steps: int, differ: int, n: int, seed: int, hand_n: int,
    quick: bool = False, progress: bool = True,
) -> None:  # fmt: skip
    """Everything that the `patch` command finds out, part by part.

    Args:
        num_steps: operations of every prompt. differ: the one in which a pair differs, from 0. n: pairs.
        hand_n: prompts of the hand-overs. quick: the first two layers and all of them, and of the sets of neighbouring
            layers those that begin at the first.
    Cost: for each site and kind of pair a quarter of a forward of n rows, or less, for each layer and position.
    """
    whole = tuple(range(model.config.n_layer))
    every = whole[:2] if quick else whole
    rows: Sequence[Layers] = [*every, whole]
    for kind in kinds(task):
        found = drawn(task, kind, num_steps, differ, n, seed)
        same = bool((found.base_answer == found.donor_answer).all())
        results.part(f"{kind}: pairs", partial(describe, model, task, found, num_steps, differ))
        for site in SITES:
            where = every if site == "resid_post" else rows
            results.part(f"{kind}: {site}", partial(maps, model, found, site, where, same, progress=progress))
    value = drawn(task, "value", num_steps, differ, n, seed)
    echo = int(value.positions[0, -1])
    after = [p for p in range(echo, value.base_ids.shape[1]) if (p - echo) % 2 == 1 or p == echo]
    for site in ("ssm_state", "recurrent_state"):
        sets = [layers for layers in windows(model.config.n_layer) if not quick or layers[0] == 0]
        what = partial(maps, model, value, site, sets, positions=after, progress=progress)
        results.part(f"windows: {site}", what)
    for site in SITES:
        where = every if site == "resid_post" else rows
        results.part(f"needed: {site}", partial(necessity, model, value, site, where, progress))
    results.part("without", partial(without, model, task, num_steps, hand_n, seed))
    if task.name == "doublethink":
        both = {kind: drawn(task, kind, num_steps, differ, n, seed) for kind in ("value", "overt")}
        channels(results, model, task, both, num_steps)
    if task.name == "masked":
        results.part("handover", partial(handover, model, task, num_steps=num_steps, n=hand_n, seed=seed))
        for length in [num_steps] if quick else [max(2, num_steps - 2), num_steps, num_steps + 2]:
            again = partial(shifted, model, task, num_steps=length, n=hand_n, seed=seed)
            results.part(f"shifted, {length} operations", again)


@torch.no_grad()
def describe(model: Mamba, task: Task, found: Pairs, num_steps: int, differ: int) -> dict[str, Any]:
    """What the pairs are, and how many the model answers right."""
    base, donor = (run(model, ids, last_only=True) for ids in (found.base_ids, found.donor_ids))
    gap = logit_diff(donor, found.donor_answer, found.base_answer) - logit_diff(
        base, found.donor_answer, found.base_answer
    )
    return {
        "pairs": len(found.base_ids),
        "words": words(task, num_steps, differ),
        "differ_at": found.positions[0],
        "right": {
            "base": right(base, found.base_answer).mean().item(),
            "donor": right(donor, found.donor_answer).mean().item(),
        },
        "gap_nats": gap.mean().item(),
        "backend": base.backend,
    }
