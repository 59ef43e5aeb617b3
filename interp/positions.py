"""Places in a batch whose rows may differ in length.

One layer or position that is asked for; which positions each row has; what of a recording is tokens and not padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Address, Mamba, MambaState, Plan
from minimal_mamba.address import resolve, selector
from minimal_mamba.errors import InputError

from .run import Run, known, span


def one_layer(model: Mamba, layer: int) -> int:
    """The number of a layer, counted from 0; raises InputError for several, AddressError for one that is not there."""
    known(model)
    chosen = selector(layer, "layer")
    if not isinstance(chosen, int):
        raise InputError(f"layer={layer!r}: this method takes one layer, an int; call it once a layer.")
    return resolve(chosen, model.config.n_layer, "layer")[0]


def one_position(pos: int) -> int:
    """A position as an int; raises InputError for several."""
    chosen = selector(pos, "pos")
    if not isinstance(chosen, int):
        raise InputError(f"pos={pos!r}: this method takes one position, an int; call it once a position.")
    return chosen


def from_start(pos: int, sizes: Tensor) -> Tensor:
    """(b,) a position that is counted from each row's own end if negative, counted from its start."""
    return sizes + pos if pos < 0 else torch.full_like(sizes, pos)


def local(out: Run, pos: int, state: MambaState | None) -> Tensor:
    """(b,) which token of this run a position means in each row; the run has checked that there is one."""
    start, stop = span(out.ids, out.lengths, state)
    return from_start(pos, stop) - start.cpu()


def tokens(out: Run) -> Tensor:
    """(b, l) bool: True on a run's tokens, False on padding."""
    return (torch.arange(out.ids.shape[1]) < out.lengths[:, None]).to(out.logits.device)


def present(model: Mamba, out: Run, place: Address, state: MambaState | None = None) -> Tensor:
    """(b, positions) bool: which of a place's positions each row has; a recording of it is NaN at the others."""
    return Plan(model.config, (), [place], *span(out.ids, out.lengths, state)).present(place).to(out.logits.device)


def columns(model: Mamba, out: Run, place: Address) -> list[int]:
    """What the columns of a recording of a slice are; `Plan.columns`."""
    return Plan(model.config, (), [place], *span(out.ids, out.lengths, None)).columns(place)


def of_tokens(out: Run, address: Address) -> Tensor:
    """A recording along all positions of several layers, (layers, tokens of all rows, ...): no padding."""
    found = out.records[address]  # (layers, b, the longest row's, ...)
    return found[:, tokens(out)[:, : found.shape[2]]]


def on_tokens(out: Run, address: Address) -> Tensor:
    """A recording along all positions of one layer, (b, l, ...), with zeros on padding; a NaN of the model stays."""
    found = along(out.records[address], out.ids.shape[1])
    return torch.where(tokens(out).reshape(*out.ids.shape, *[1] * (found.dim() - 2)), found, 0.0)


def along(found: Tensor, l: int) -> Tensor:
    """Values (b, m, ...) of all positions that some row has, as (b, l, ...): the rest is padding in every row."""
    return F.pad(found, [0, 0] * (found.dim() - 2) + [0, l - found.shape[1]]) if found.shape[1] < l else found
