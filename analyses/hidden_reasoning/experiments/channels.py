"""`doublethink`: the text shows one value and the model works on another; whether they are kept in different places.

Two kinds of pairs differ in one operation. In one the hidden value differs and the overt one, at every word, does not;
in the other it is the other way round. What is put in is the donor's memory; what is read is the final answer, and the
next overt value that the model writes.
"""

from typing import Any

import torch
from torch import Tensor

from interp import accuracy as right
from interp import logit_diff, patch_grid
from interp.sweep import groups
from minimal_mamba import Mamba

from ..task import Pairs, Task
from .probing import places
from .results import Results

SITES = ("ssm_state", "conv_state", "recurrent_state", "resid_post")
GROUPS = 16  # of channels, a layer


def overt_ids(task: Task, found: Pairs, at: int) -> tuple[Tensor, Tensor]:
    """(b,) the tokens of base's and donor's overt value after the operation whose word is at this position."""
    return task.value_ids[found.base_overt[:, at]], task.value_ids[found.donor_overt[:, at]]


def next_overt(
    model: Mamba, task: Task, found: Pairs, site: str, pos: int, num_steps: int, parts: Any = None, rows: Any = None
) -> dict[str, Tensor] | None:
    """The effect of a patch at a position on the next overt value: (layers, [parts]) share, its error, and flips.

    None where no overt value is to come. The share is NaN where base's and donor's overt values agree.
    """
    coming = [p for p in places(task, num_steps) if p > pos or (p == pos and site != "conv_state")]
    if not coming:
        return None
    base, donor = overt_ids(task, found, coming[0])
    end = coming[0] + 1  # what comes later cannot matter
    grids = patch_grid(
        model, found.base_ids[:, :end], found.donor_ids[:, :end], site=site, layers=rows, positions=[pos], parts=parts,
        metric={"gap": lambda logits: logit_diff(logits, donor, base), "flip": lambda logits: 1 - right(logits, base)},
        progress=False,
    )  # fmt: skip
    flip = grids["flip"].values.mean(-1)[:, 0]
    made = {"flip": flip}
    if bool((base != donor).any()):
        gap = grids["gap"]
        made |= {"share": gap.recovered()[:, 0], "error": gap.recovered_error()[:, 0]}
    return made


def overt_map(model: Mamba, task: Task, found: Pairs, site: str, num_steps: int, rows: Any) -> dict[str, Any]:
    """`next_overt` at every position from the operation that differs on."""
    first = int(found.positions[0, -1])
    positions, columns = [], []
    for pos in range(first, found.base_ids.shape[1]):
        made = next_overt(model, task, found, site, pos, num_steps, rows=rows)
        if made is not None:
            positions.append(pos)
            columns.append(made)
    return {
        "layers": rows,
        "positions": positions,
        **{name: torch.stack([c[name] for c in columns], 1) for name in columns[0]},
    }


def by_channel(
    model: Mamba, task: Task, value: Pairs, overt: Pairs, site: str, num_steps: int, pos: int
) -> dict[str, Any]:
    """Each layer's channels in groups: the answer under patches of one kind of pairs, the next overt value of another.

    Returns:
        (layers, groups) of both shares, and their errors.
    """
    parts = groups(model, "e", -(-model.config.d_inner // GROUPS))
    answer = patch_grid(
        model, value.base_ids, value.donor_ids, site=site, positions=[pos], parts=parts, progress=False,
        metric=lambda logits: logit_diff(logits, value.donor_answer, value.base_answer),
    )  # fmt: skip
    hidden = answer.recovered()[:, 0]
    shown = next_overt(model, task, overt, site, pos, num_steps, parts=parts)
    assert shown is not None
    return {
        "position": pos,
        "groups": list(parts),
        "hidden": hidden,
        "hidden_error": answer.recovered_error()[:, 0],
        "overt": shown["share"],
        "overt_error": shown["error"],
    }


def channels(results: Results, model: Mamba, task: Task, drawn: dict[str, Pairs], num_steps: int) -> None:
    """What the `patch` command finds out of `doublethink` beyond the maps of the answer."""
    every = list(range(model.config.n_layer))
    for kind, found in drawn.items():
        for site in SITES:
            rows = every if site == "resid_post" else [*every, tuple(every)]
            results.part(
                f"{kind}, next overt: {site}",
                lambda found=found, site=site, rows=rows: overt_map(  # type: ignore[misc]
                    model, task, found, site, num_steps, rows
                ),
            )
    echo = int(drawn["value"].positions[0, -1])
    for after in (1, 2):
        results.part(
            f"channels: conv_state, {after} after",
            lambda after=after: by_channel(  # type: ignore[misc]
                model, task, drawn["value"], drawn["overt"], "conv_state", num_steps, echo + after
            ),
        )
