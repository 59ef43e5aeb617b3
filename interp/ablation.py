"""Ablations, as ordinary edits: zero, mean and resample of any place, freeze and forget of the state.

A place is an address, a product of channels and dimensions; a `mask` picks any set of them, such as a band of
`decay_bands`. What is made are edits for `run`, `generate` and sweeps, to be printed, saved and combined like others:

run(model, ids, edits=[*ablate(at.ssm_state(layer=3), mask=decay_bands(model, 3)[0]), *freeze(layer=5, pos=7)])
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Add, Address, Edit, Mamba, Mean, Scale, Set, Zero, at
from minimal_mamba.address import EVERYTHING, selector
from minimal_mamba.edits import Rows
from minimal_mamba.errors import EditError, InputError

from .positions import columns, present
from .run import each, run

Which = int | slice | Sequence[int]
EVERY = slice(None)
HOW = ("zero", "mean", "resample")


def set_where(place: Address, mask: Tensor, to: Tensor | float, *, rows: Rows = None) -> list[Edit]:
    """Put `to` where the mask is True and leave the rest of the place as it is.

        old (1 - mask) + to mask: exact for every finite old value

    Args:
        mask: bool, in the shape of the place's feature axes, such as (e, n) for a state; or of all that it records.
        to: one number, or a value as for `Set`; it is not read where the mask is False.
    Returns:
        Two edits, a Scale and an Add, to be given in this order. Where the mask is False everywhere nothing changes.
    Raises:
        EditError: a mask that is not bool.
    """
    off = _off(mask, place)
    value = torch.as_tensor(to, dtype=None if isinstance(to, Tensor) else torch.float64)
    kept = torch.where(mask.to(value.device), value, value.new_zeros(()))
    return [Scale(place, off, rows=rows), Add(place, kept, rows=rows)]


def ablate(
    place: Address, how: str = "zero", *, values: Tensor | None = None, mask: Tensor | None = None, seed: int = 0,
    rows: Rows = None,
) -> list[Edit]:  # fmt: skip
    """Take away what a place says about this input.

    Args:
        place: any address; an `e=` or `n=` picks channels and dimensions.
        how: "zero"; "mean": what `mean_of` gave as `values`, or the batch's mean if None; "resample": the rows of
            `values`, as `run_[place]` recorded them, change places by a `derangement` of this seed, so that each row
            gets the value of another.
        mask: ablate only this set, as in `set_where`.
        rows: of the batch, as in `Set`; for "resample" `values` then has those rows.
    Returns:
        Edits, to be given in this order.
    Raises:
        EditError: an unknown `how`, or values missing or too many; one row alone cannot be resampled, nor rows of
            which some lack a position.
    """
    if how not in HOW:
        raise EditError(f"how={how!r}: there are {', '.join(HOW)}.")
    if how == "zero" and values is not None:
        raise EditError(f"{place}: zero takes no values; did you mean mean or resample?")
    if values is None and (how == "resample" or (how == "mean" and mask is not None)):
        wanted = "run_[place] of a run" if how == "resample" else "with a mask, the mean itself, as mean_of makes it"
        raise EditError(f"{place}: {how} needs values, {wanted}.")
    if how == "resample" and values is not None:
        axis = int(place.layer_axis)  # the batch's
        order = derangement(values.shape[axis] if values.dim() > axis else 1, seed)
        values = values.index_select(axis, order.to(values.device))
        if mask is None and bool(values.isnan().any()):  # no case for nan_to_num, as of `Set`
            raise EditError(
                f"{place}: the values hold NaN, as at positions that a padded row lacks, which another row would be "
                "given. Name positions that all rows have, such as -1 or slice(-2, None), or take rows of one length."
            )
    if mask is not None:
        if values is None:
            return [Scale(place, _off(mask, place), rows=rows)]
        return set_where(place, mask, values, rows=rows)
    if how == "mean":
        return [Mean(place, values, rows=rows)]
    return [Zero(place, rows=rows) if values is None else Set(place, values, rows=rows)]


def derangement(b: int, seed: int = 0) -> Tensor:
    """A permutation of b rows in which none stays where it is, drawn uniformly, (b,) int64.

    Raises:
        EditError: fewer than two rows.
    """
    if b < 2:
        raise EditError(f"{b} row has no other to take a value from; give at least two.")
    rng = torch.Generator().manual_seed(seed)
    while True:  # one draw in e succeeds
        order = torch.randperm(b, generator=rng)
        if not bool((order == torch.arange(b)).any()):
            return order


def freeze(
    layer: Which, pos: Which = EVERY, *, e: Which = EVERY, n: Which = EVERY, mask: Tensor | None = None,
    rows: Rows = None,
) -> list[Edit]:  # fmt: skip
    """Let no time pass for the state at these positions: nothing is written and nothing forgotten, h_t = h_{t-1}.

    dt = 0 for whole channels; for some dimensions, or a mask (e, n), decay = 1 and state_write = 0. The skip D u and
    the conv go on.

    Returns:
        Edits of `dt`, or of `decay` and `state_write`.
    """
    if mask is None and selector(n, "n") == EVERYTHING:
        return [Set(at.dt(layer=layer, pos=pos, e=e), torch.tensor(0.0), rows=rows)]
    kept, written = (site(layer=layer, pos=pos, e=e, n=n) for site in (at.decay, at.state_write))
    if mask is None:
        return [Set(kept, torch.tensor(1.0), rows=rows), Zero(written, rows=rows)]
    return [*set_where(kept, mask, 1.0, rows=rows), *ablate(written, mask=mask, rows=rows)]


def forget(
    layer: Which, pos: Which = EVERY, *, e: Which = EVERY, n: Which = EVERY, mask: Tensor | None = None,
    rows: Rows = None,
) -> list[Edit]:  # fmt: skip
    """Forget all that the state held before these positions: decay = 0, so that h_t = dt B u of this token alone.

    Returns:
        Edits of `decay`. The three tokens that the conv remembers are not forgotten: zero `conv_state` for that.
    """
    return ablate(at.decay(layer=layer, pos=pos, e=e, n=n), mask=mask, rows=rows)


@torch.no_grad()
def mean_of(
    model: Mamba, batches: Iterable[Tensor | Sequence[Tensor]], place: Address, *, by_position: bool = False,
    edits: Edit | Iterable[Edit] = (), backend: str = "auto", progress: bool = True,
) -> Tensor:  # fmt: skip
    """The mean of a place over a dataset, for `ablate(place, "mean", values=...)`.

    Args:
        batches: ids (b, l), or pairs of ids and lengths (b,), as a `DataLoader` gives them; each row, and each position
            that it has, counts the same.
        place: an address; its positions are those of each batch.
        by_position: keep a mean for each of the place's positions, of which all batches then have the same number.
    Returns:
        In the shape that the place records, with 1 for the batch's axis and, unless `by_position`, for the positions'.
        Summed in float64.
    Raises:
        InputError: no batches, or batches that disagree about the positions.
    Cost: one forward a batch, and one recording of the place.
    """
    several = each(edits, Edit)
    axis = int(place.layer_axis)  # the batch's
    over = (axis,) if by_position or isinstance(place.pos, int) else (axis, axis + 1)
    if isinstance(batches, Tensor) and batches.dim() == 2:
        raise InputError(
            f"batches is one tensor {tuple(batches.shape)}: give a list of them, mean_of(model, [ids], ...)."
        )
    total = count = before = None
    dtype = torch.float64
    for batch in tqdm(batches, desc=f"mean of {place}", disable=not progress):
        ids, lengths = _batch(batch)
        out = run(model, ids, several, record=[place], backend=backend, lengths=lengths, last_only=True)
        found = out[place]
        has = present(model, out, place)  # (b, positions)
        has = (has[:, 0] if isinstance(place.pos, int) else has)[(None,) * axis]
        missing = ~has.reshape(has.shape + (1,) * (found.dim() - has.dim()))
        dtype = found.dtype
        sums = found.double().masked_fill(missing, 0.0).sum(over, keepdim=True)
        rows = (~missing).double().sum(over, keepdim=True)
        now = columns(model, out, place) if by_position and not isinstance(place.pos, int) else None
        if total is not None and (total.shape != sums.shape or now != before):
            raise InputError(
                f"{place}: this batch has the shape {tuple(sums.shape)}, those before {tuple(total.shape)}"
                + (f", and the positions {now}, before {before}" if total.shape == sums.shape else "")
                + ". Name positions that all batches have, or leave by_position out."
            )
        before = now
        total, count = (sums, rows) if total is None or count is None else (total + sums, count + rows)
    if total is None or count is None:
        raise InputError("batches is empty: give at least one, (b, l) ids each.")
    return (total / count).to(dtype)


def _batch(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ids and lengths; of `DataLoader` both come in a list, also where there are ids alone."""
    if isinstance(batch, tuple) or (isinstance(batch, list) and batch and isinstance(batch[0], Tensor)):
        if len(batch) not in (1, 2):
            raise InputError(f"a batch holds {len(batch)} tensors: give ids (b, l), or a pair of ids and lengths (b,).")
        return batch[0], batch[1] if len(batch) == 2 else None
    return cast(Tensor, batch), None


def _off(mask: Tensor, place: Address) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise EditError(f"{place}: a mask is a bool tensor, True where the edit acts; this one is {mask!r:.60}.")
    return ~mask
