"""What a probe is given, understood: features, labels, groups, and the columns of a grid."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minimal_mamba.address import resolve, selector
from minimal_mamba.errors import AddressError, InputError

from .positions import from_start


def read_ints(**given: Any) -> list[int]:
    """Each as an int, numpy's and torch's too."""
    try:
        return [operator.index(v) for v in given.values()]
    except TypeError:
        raise InputError(f"{', '.join(f'{name}={v!r}' for name, v in given.items())}: give ints.") from None


def read_features(what: str, given: Any) -> Tensor:
    """(rows, *features) float64, on the CPU, of a tensor or an array."""
    try:
        x = torch.as_tensor(given).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}: no tensor or array of numbers ({error}); give (rows, *features).") from None
    if x.dim() < 2 or not x.numel() or not x.isfinite().all():
        raise InputError(
            f"{what} {tuple(x.shape)}: (rows, *features), without NaN (a padded row's missing positions, or "
            "the model's own) and infinity."
        )
    return x


def read_labels(labels: Any, rows: int) -> tuple[Tensor, tuple[Any, ...] | None]:
    """Numbers (rows,) float64 and None, or indices of classes (rows,) and the classes."""
    values = _plain(labels)
    if len(values) != rows or any(isinstance(v, list | tuple) for v in values):
        raise InputError(f"{len(values)} labels for {rows} rows: give one each.")
    strange = [v for v in values if not isinstance(v, str | int | float)]
    if strange:
        raise InputError(
            f"{strange[0]!r} is no label: classes are ints, bools or strings, numbers are floats. Leave out the "
            "rows that have none."
        )
    if len({isinstance(v, str) for v in values}) > 1:
        raise InputError("the labels mix strings with numbers: give classes of one type.")
    if any(isinstance(v, float) for v in values):
        y = torch.tensor(values, dtype=torch.float64)
        if not y.isfinite().all() or not (y != y[0]).any():
            raise InputError("the labels are numbers that hold NaN or infinity, or do not vary.")
        return y, None
    classes = tuple(sorted(set(values)))
    if len(classes) < 2:
        raise InputError(f"all labels are {classes}: a probe needs two classes, or numbers (floats).")
    return torch.tensor([classes.index(v) for v in values]), classes


def read_groups(groups: Any, rows: int) -> Tensor:
    """(rows,) 0, 1, ... one number a group."""
    values = _plain(groups)
    if len(values) != rows or any(isinstance(v, list) for v in values):
        raise InputError(f"{len(values)} groups for {rows} rows: give one each.")
    names = {g: i for i, g in enumerate(dict.fromkeys(values))}
    return torch.tensor([names[g] for g in values])


def hold_out(group: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """(rows,) bool: the rows of this share of the groups, drawn, of one at least; one at least is left."""
    n = int(group.max()) + 1
    if n < 2:
        raise InputError(f"the {len(group)} rows are one group, and those that are scored are not fitted: give two.")
    return torch.isin(group, torch.randperm(n, generator=rng)[: min(n - 1, max(1, round(share * n)))])


def _plain(given: Any) -> list[Any]:
    """Python's own values of a tensor, an array or a sequence: one of its own scalars is equal to no other tensor."""
    values = given.tolist() if hasattr(given, "tolist") else list(given)
    return [v.tolist() if hasattr(v, "tolist") else v for v in values]


def alike(x: Tensor) -> Any:
    """(rows,) groups of the rows that are the same; where all are, none tells on another: each alone.

    To five digits of a column's largest: a batch of another size can change the last ones.
    """
    steps = (x / x.abs().amax(0).clamp(min=torch.finfo(x.dtype).tiny) * 1e5).round() + 0  # +0 is -0 too
    found = [row.tobytes() for row in steps.numpy()]
    return found if len(set(found)) > 1 else range(len(x))


def same_so_far(ids: Tensor, where: Tensor) -> Any:
    """(b,) groups of the prompts that are the same up to a position that is probed, or by a chain of such.

    Args:
        where: (columns, b) those positions, from the start; -1 where there is no label.
    """
    leads: dict[Any, Any] = {}  # of a prompt or what it begins with, another of its group

    def first(x: Any) -> Any:
        while leads.setdefault(x, x) != x:
            leads[x] = leads[leads[x]]  # shorter for the next
            x = leads[x]
        return x

    for i, (row, ends) in enumerate(zip(ids.tolist(), where.T.tolist(), strict=True)):
        for end in ends:
            if end >= 0:
                leads[first((*row[: end + 1],))] = first(i)
    found = [first(i) for i in range(len(ids))]
    return found if len(where) > 1 or len(set(found)) > 1 else range(len(ids))


def permute(y: Tensor, group: Tensor, rng: torch.Generator) -> Tensor:
    """The labels in another order: of whole groups where each has one label, else of rows."""
    first = torch.zeros(int(group.max()) + 1, dtype=y.dtype).scatter(0, group.flip(0), y.flip(0))
    if bool((first[group] == y).all()):
        return first[torch.randperm(len(first), generator=rng)][group]
    return y[torch.randperm(len(y), generator=rng)]


def read_columns(positions: Any, sizes: Tensor) -> list[list[int]]:
    """The positions of each column of a grid."""
    shortest = int(sizes.min())
    if positions is None or isinstance(positions, int | slice):
        if isinstance(positions, slice | None) and bool((sizes != shortest).any()):
            raise AddressError(f"the rows have lengths {sizes.tolist()}: name the positions, as in positions=[0, -1].")
        chosen = selector(slice(None) if positions is None else positions, "pos")
        return [[p] for p in resolve(chosen, shortest, "pos")] if not isinstance(chosen, int) else [[chosen]]
    columns = [list(p) if isinstance(p, Sequence) else [int(p)] for p in positions]
    for column in columns:
        resolve(selector(column, "pos"), shortest, "pos")  # raises for what the shortest row has not
    return columns


def labels_at(labels: Any, pos: int, sizes: Tensor) -> Tensor:
    """(b,) the labels of a position, counted from each row's own end if negative."""
    try:
        y = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError("labels of a grid are numbers or indices of classes, (b,) or (b, l); index strings.") from None
    if not y.is_floating_point() and bool((y < -1).any()):
        raise InputError(
            f"labels of a grid hold {int(y.min())}: indices of classes are 0 or more, and -1 says that there is no "
            "label. If these are numbers, give floats."
        )
    if y.shape == (len(sizes),):
        return y
    if y.dim() != 2 or len(y) != len(sizes) or y.shape[1] < int(sizes.max()):
        raise InputError(f"labels {tuple(y.shape)}: (b,), or (b, l) for {len(sizes)} rows of up to {int(sizes.max())}.")
    return y[torch.arange(len(sizes)), from_start(pos, sizes)]
