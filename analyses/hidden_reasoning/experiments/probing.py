"""What linear probes read of the state and the residual stream, and what goes when the model cannot read it there.

Two accounts of how the answer comes about put different numbers into the memory. Step by step: the running value, after
the operations named so far. From the prompt as a whole: the answer is the sum of the shifts, each times the product of
the multipliers after it, so partial sums, or the answer itself, can stand there while the text is still at an early
operation. Each is a label of the same activations.

    value     the running value              product   of the multipliers so far
    answer    the final value                rest      the product of the multipliers to come
    partial   value times rest: what the operations so far add to the answer
    overt     of `doublethink`: the value that the text shows
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp import Project, at, collect, probe, run
from minimal_mamba import Mamba

from ..task import OPERATIONS, Batch, Task, draw
from .results import Results

STREAM = 5  # keeps the seeds of these prompts apart from all others
SITES = ("resid_post", "ssm_state")
FOLDS = 4
CONTROLS = 5  # spaces of shuffled labels that are erased


def labels(task: Task, batch: Batch) -> dict[str, Tensor]:
    """(b, s) of each label after each step; those of the two accounts only where the multipliers can be inverted."""
    found = {"value": batch.values}
    if task.name == "doublethink":
        letters = torch.from_numpy(task.letters)[batch.operations].cumsum(1) % task.modulus
        return found | {"overt": letters}
    found["answer"] = batch.values[:, -1:].expand_as(batch.values)
    if task.acts == "arithmetic" and task.invertible:
        factors = np.array([OPERATIONS[name][0] for name in task.operations])[batch.operations.numpy()]
        so_far = np.ones_like(factors)
        for i in range(factors.shape[1]):
            so_far[:, i] = factors[:, i] * (so_far[:, i - 1] if i else 1) % task.modulus
        rest = np.ones_like(factors)
        for i in reversed(range(factors.shape[1] - 1)):
            rest[:, i] = rest[:, i + 1] * factors[:, i + 1] % task.modulus
        found |= {"product": torch.from_numpy(so_far), "rest": torch.from_numpy(rest)}
        found["partial"] = found["value"] * found["rest"] % task.modulus
    return found


def last_word_alone(task: Task, steps: int) -> list[float]:
    """The best accuracy of a guess of the value after each step that knows the last operation only, exactly."""
    p, found = np.eye(task.modulus)[task.start], []
    for _ in range(steps):
        after = np.stack([np.bincount(row, weights=p, minlength=task.modulus) for row in task.table])  # (ops, v)
        found.append(float(after.max(1).mean()))
        p = after.mean(0)
    return found


def places(task: Task, num_steps: int) -> list[int]:
    """The position of each operation's word in the reasoning."""
    first = num_steps + (3 if task.name == "masked" else 1)
    return [first + 2 * i for i in range(num_steps)]


def curves(
    model: Mamba, fresh: Mamba, batch: Batch, site: str, layer: int, positions: Sequence[int],
    wanted: dict[str, Tensor], seeds: int,
) -> dict[str, Any]:  # fmt: skip
    """Probes of one site of one layer at some positions: by label, lists over positions.

    Args:
        fresh: a model that was never trained. wanted: name -> (b, positions).
    """
    ids = batch.ids[:, : int(batch.answer_at[0]) + 1]
    place = [getattr(at, site)(layer=layer, pos=p) for p in positions]
    ours, theirs = (collect(m, ids, place, batch=256) for m in (model, fresh))
    kept = ("score", "low", "high", "shuffled", "random")
    found: dict[str, Any] = {name: {k: [] for k in kept} for name in wanted}
    for i, a in enumerate(place):
        for name, values in wanted.items():
            if len(values[:, i].unique()) < 2:
                made: dict[str, float | None] = dict.fromkeys(kept)
            else:
                p = probe(ours[a], values[:, i], folds=FOLDS, seeds=seeds, other=theirs[a])
                made = {
                    "score": p.score,
                    "low": p.interval[0],
                    "high": p.interval[1],
                    "shuffled": sum(p.controls["shuffled"]) / seeds,
                    "random": p.controls["random"][0],
                }
            for key, value in made.items():
                found[name][key].append(value)
    return found


@torch.no_grad()
def erase(model: Mamba, task: Task, num_steps: int, n: int, seed: int, name: str, layer: int) -> dict[str, Any]:
    """Take what tells a label's classes apart out of the residual stream after a layer, in all of the reasoning.

    That is the space in which the classes' means differ, on other prompts, over all words of the reasoning that name an
    operation: where the means agree no linear probe can tell the classes apart (Belrose et al. 2023, arXiv:2306.03819,
    theorem 3.1), which is not so of the space that a probe's weights span. The controls are spaces of as many
    dimensions made in the same way from shuffled labels: where the stream varies most, and without the label. A space
    drawn evenly from all directions would hold next to nothing of the stream.
    Returns:
        the share of right final answers, and of `doublethink` of right overt values, with nothing, the space and each
        of `CONTROLS` controls taken out; and how much of the stream's variance each takes.
    """
    fit, test = (draw(num_steps, n, [STREAM, seed, i], task=task) for i in (1, 2))
    where = places(task, num_steps)
    end = int(fit.answer_at[0]) + 1
    place = [at.resid_post(layer=layer, pos=p) for p in where]
    recorded = collect(model, fit.ids[:, :end], place, batch=256)
    features = torch.cat([recorded[a] for a in place])
    classes = labels(task, fit)[name].T.flatten()
    rng = torch.Generator().manual_seed(seed)
    basis = between(features, classes)
    controls = [between(features, classes[torch.randperm(len(classes), generator=rng)]) for _ in range(CONTROLS)]
    everywhere = at.resid_post(layer=layer, pos=slice(where[0], None))
    ids, targets = test.ids[:, :end], test.targets[:, :end]
    spread = (features - features.mean(0)).double()

    def without(space: Tensor | None) -> dict[str, float]:
        guess = run(model, ids, edits=[] if space is None else [Project(everywhere, space.float())]).logits.argmax(-1)
        right = guess == targets
        made = {"answer": right[:, -1].double().mean().item()}
        if task.name == "doublethink":
            made["overt"] = right[:, where].double().mean().item()
        if space is not None:
            made["variance"] = float((spread @ space.T).square().sum() / spread.square().sum())
        return made

    found = {"nothing": without(None), "space": without(basis), "controls": [without(c) for c in controls]}
    return found | {"dimensions": len(basis), "prompts": n}


def between(features: Tensor, classes: Tensor) -> Tensor:
    """The space in which the means of classes differ: (classes - 1, d), orthonormal, in float64."""
    means = torch.stack([features[classes == c].mean(0) for c in classes.unique()])
    return torch.linalg.svd((means - means.mean(0)).double(), full_matrices=False)[2][: len(means) - 1]


def probing(
    results: Results, model: Mamba, task: Task, *, num_steps: int, n: int, seed: int, seeds: int = 1,
    layers: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Everything that the `probe` command finds out, part by part.

    Cost: of each site and layer a forward, and for each word of the reasoning and label (2 + seeds) * folds small
        eigendecompositions.
    """
    torch.manual_seed(seed)
    fresh = Mamba(model.config).eval()
    batch = draw(num_steps, n, [STREAM, seed, 0], task=task)
    wanted, where = labels(task, batch), places(task, num_steps)
    results.part("alone", lambda: last_word_alone(task, num_steps))
    results.part("steps", lambda: list(range(1, num_steps + 1)))
    for site in SITES:
        for layer in range(model.config.n_layer) if layers is None else layers:
            what = partial(curves, model, fresh, batch, site, layer, where, wanted, seeds)
            results.part(f"{site}, layer {layer}", what)
    for name in wanted:
        if name in ("value", "overt", "answer"):
            for layer in range(model.config.n_layer) if layers is None else layers:
                what = partial(erase, model, task, num_steps, n, seed, name, layer)
                results.part(f"erase {name}, layer {layer}", what)
