"""An `Item`: one edit or recording of one site, resolved against one run, and the indexing that it needs.

Three shapes recur. A whole site is (b, l, *features); what an item selects of it is (R, c, *features), for its R rows
and the c of its positions that lie in the present call. A site inside the recurrence is offered as (b, *features) at
each position t; an item selects (K, *features), for the K rows that mean this t. And a value is (layers, R, P,
*features), of size 1 where it is the same along an axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .address import Address, Span
from .edits import Apply, Edit, Project
from .errors import AddressError, EditError, NotReached, ShapeMismatch
from .sites import SITES


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Edit):
    """Adds a zero whose gradient is wanted; made by `gradients`, not by users. Every site, `recurrent_state` too."""

    zero: Tensor
    tensor = "zero"

    def __post_init__(self) -> None:
        pass

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        assert value is not None
        return old + value


@dataclass
class Item:
    """One edit or recording of one site, with its address resolved against this run."""

    source: Edit | Address
    site: str
    layers: list[int | None]
    rows: Tensor  # (R,) rows that are read
    write: Tensor  # (R,) bool: rows that are changed
    pos: Tensor  # (R, P) absolute positions, -1 where a row has none
    index: list[list[int]] | None  # chosen channels of each feature axis; None: all
    dropped: tuple[bool, ...]  # which of (position, *features) an int chose
    value: Tensor | None  # (layers, R, P, *features), with 1 where it broadcasts; for Project (m, *features)
    done: int = 0
    pieces: dict[int | None, list[tuple[Tensor, Tensor | None, Tensor]]] = field(default_factory=dict)
    lines: dict[tuple[int | None, bool], tuple[Tensor, ...]] = field(default_factory=dict)  # the value by position
    room: Tensor | None = None  # (layers, R, P, *features), where a scan may write a whole recording
    live: bool = True  # in the present call; before the first, in any
    # of the present call: columns of `pos` inside it, their local times (R, c), and which of them exist
    cols: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    local: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    valid: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    by_time: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # t -> (i into rows, j into pos)

    @property
    def edit(self) -> Edit | None:
        return self.source if isinstance(self.source, Edit) else None

    @property
    def is_probe(self) -> bool:
        """Whether it is there for its gradient alone."""
        return isinstance(self.source, Probe)

    @property
    def is_edit(self) -> bool:
        """Whether it changes something."""
        return self.edit is not None and not self.is_probe

    @property
    def expected(self) -> int:
        return len(self.layers) * int(((self.pos >= 0) & self.write[:, None]).sum())

    def begin(self, start: Tensor, lengths: Tensor) -> None:
        local = self.pos - start[self.rows, None]
        valid = (self.pos >= 0) & (local >= 0) & (local < lengths[self.rows, None])
        self.cols = valid.any(0).nonzero()[:, 0]
        self.local, self.valid = local[:, self.cols], valid[:, self.cols]
        self.live = len(self.cols) > 0
        self.by_time = {}
        whole_batch = self.edit is not None and self.edit.over_batch
        if whole_batch and bool((self.valid.sum(0) < (self.pos[:, self.cols] >= 0).sum(0)).any()):
            raise EditError(
                f"{self.edit}: the rows reach this position in different calls of the model, so that no call sees the "
                "whole batch's mean. Give the mean."
            )
        if SITES[self.site].per_position:
            i, c = self.valid.nonzero(as_tuple=True)  # of each time its rows ascend
            times, order = self.local[i, c].sort(stable=True)
            each, counts = times.unique_consecutive(return_counts=True)
            i, j, counts = i[order], self.cols[c[order]], counts.tolist()
            self.by_time = dict(zip(each.tolist(), zip(i.split(counts), j.split(counts), strict=True), strict=True))
            if whole_batch:
                together = all(int(self.valid[:, c].sum()) == len(i) for c, j in enumerate(self.cols.tolist())
                               for i, js in self.by_time.values() if j in js)  # fmt: skip
                if not together:
                    raise EditError(
                        f"{self.edit}: the rows reach this position at different times, and {self.site} exists one "
                        "time at a time. Give the mean, or a position counted from the start."
                    )

    def end(self, stop: Tensor) -> None:
        """The rows have no positions from `stop` (b,) on; NotReached where one must have been reached."""
        gone = self.pos >= stop[self.rows, None]
        if not gone.any():
            return
        pos = self.pos.where(~gone, -1)
        address = self.source.address if isinstance(self.source, Edit) else self.source
        some = isinstance(address.pos, Span)  # of which a row has what it has
        missing = self.write & ((pos < 0).all(1) if some else gone.any(1))
        if missing.any():
            i = int(missing.nonzero()[0])
            row = int(self.rows[i])
            raise NotReached(
                f"{self.source}: row {row} stopped, and its last position is {int(stop[row]) - 1}; it has no position "
                f"{int(self.pos[i][gone[i]][0])}. Give a slice that begins before, other rows=, or no stop=."
            )
        self.pos = pos[:, : int((pos >= 0).any(0).nonzero().max()) + 1] if (pos >= 0).any() else pos[:, :0]

    def features(self, lead: int) -> tuple[Tensor, ...]:
        """The chosen channels as index tensors that broadcast after `lead` leading axes."""
        assert self.index is not None
        n = len(self.index)
        return tuple(
            torch.tensor(c).reshape([1] * (lead + a) + [-1] + [1] * (n - 1 - a)) for a, c in enumerate(self.index)
        )

    def visible(self, x: Tensor, lead: int) -> Tensor:
        """Drop the axes that an int chose; `lead` axes stay in front (the position's is axis 1 when lead is 2)."""
        drop = [lead + a for a, gone in enumerate(self.dropped[1:]) if gone]
        if lead == 2 and self.dropped[0]:
            drop.append(1)
        return x.squeeze(tuple(drop)) if drop else x

    def of(self, layers: list[int | None]) -> "Item":
        """The item in some of its layers."""
        value = self.value
        if value is not None and not isinstance(self.edit, Project) and value.shape[0] > 1:
            value = value[[self.layers.index(layer) for layer in layers]]
        return replace(self, layers=layers, value=value, lines={})

    def place(self, layer: int | None) -> Tensor | None:
        """This layer's part of the room (R, P, *features)."""
        return None if self.room is None else self.room[self.layers.index(layer)]

    def share(self, layer: int | None) -> Tensor | None:
        """This layer's part of the value: (R, P, *features), or a Project's basis."""
        if self.value is None or isinstance(self.edit, Project):
            return self.value
        return self.value[self.layers.index(layer) if self.value.shape[0] > 1 else 0]

    def share_at(self, layer: int | None, i: Tensor, j: Tensor) -> Tensor | None:
        """This layer's part of the value at the places (i, j) of one time, whose rows ascend: (K or 1, *features)."""
        if self.value is None:
            return None
        key = layer, torch.is_grad_enabled()
        if key not in self.lines:  # an index into all positions would have a backward as large as all, at each of them
            share = self.share(layer)
            assert share is not None
            self.lines[key] = share.unbind(1)
        lines = self.lines[key]
        which = sorted(set(j.tolist())) if len(lines) > 1 else [0]
        if len(which) == 1:
            line = lines[which[0]]
            return line if len(line) in (1, len(i)) else line[i]
        some = torch.stack([lines[c] for c in which])
        return some[torch.searchsorted(torch.tensor(which), j), i if some.shape[1] > 1 else 0]

    def covers(self, value: Tensor) -> bool:
        """Whether the item selects the whole tensor (b, l, ...) in its order, so that no index is needed."""
        b, l = value.shape[:2]
        if self.index is not None or self.valid.shape != (b, l) or not self.valid.all():
            return False
        return bool((self.rows == torch.arange(b)).all() and (self.local == torch.arange(l)).all())

    def index_along(self, device: torch.device) -> tuple[Tensor, ...]:
        """Index of a whole (b, l, *features) tensor that selects (R, c, *features); position 0 where one is missing."""
        rows, times = self.rows[:, None].expand_as(self.local), self.local.where(self.valid, 0)
        if self.index is not None:
            spread = (...,) + (None,) * len(self.index)
            rows, times = rows[spread], times[spread]
            return tuple(i.to(device) for i in (rows, times, *self.features(2)))
        return rows.to(device), times.to(device)

    def index_at(self, rows: Tensor, value: Tensor) -> tuple[Tensor, ...] | None:
        """Index of a (b, *features) tensor that selects (K, *features); None where that is the tensor itself."""
        if self.index is None:
            same = len(rows) == len(value) and bool((rows == torch.arange(len(value))).all())
            return None if same else (rows.to(value.device),)
        at = (rows.reshape((-1,) + (1,) * len(self.index)), *self.features(1))
        return tuple(i.to(value.device) for i in at)

    def row_by_row(self, edit: Apply, old: Tensor) -> Tensor:
        """An Apply on `old` (R, c, *features) where rows lack some of the c: each row in a call of its own."""
        new = old.clone()
        for i, has in enumerate(self.valid):
            c = has.nonzero()[:, 0].to(old.device)
            if len(c):
                own = old[i : i + 1, c]  # (1, its positions, *features)
                made = edit.on(self.visible(own, 2)).reshape(own.shape)
                new = new.index_put((torch.full_like(c, i), c), made[0])
        return new

    def _join(self, layer: int | None) -> Tensor:
        """One layer's recording (R, P, *features) from its pieces; positions that a row lacks are NaN."""
        pieces = self.pieces[layer]
        if all(valid is None for _, valid, _ in pieces):
            cols = torch.cat([c for c, _, _ in pieces])
            joined = pieces[0][2] if len(pieces) == 1 else torch.cat([got for *_, got in pieces], 1)
            in_order = bool((cols == torch.arange(len(cols))).all())
            return joined if in_order else joined[:, cols.argsort().to(joined.device)]
        first = pieces[0][2]
        out = first.new_full((len(self.rows), self.pos.shape[1], *first.shape[2:]), torch.nan)
        for cols, valid, got in pieces:
            mask = torch.ones(got.shape[:2], dtype=torch.bool) if valid is None else valid
            i, c = mask.nonzero(as_tuple=True)
            out = out.index_put((i.to(out.device), cols[c].to(out.device)), got[i.to(got.device), c.to(got.device)])
        return out

    def joined(self) -> Tensor:
        """The recording (layers, R, P, *features)."""
        layers = [self._join(layer) for layer in self.layers]
        if self.room is not None and all(same(one, self.place(i)) for i, one in zip(self.layers, layers, strict=True)):
            return self.room
        return layers[0][None] if len(layers) == 1 else torch.stack(layers)  # one needs no copy


def positions(
    address: Address, rows: list[int], write: Tensor, source: Edit | Address, start: Tensor, stop: Tensor, ends: Tensor
) -> Tensor:
    """The positions (R, P) that an address means in each row, -1 where a row has none.

    Columns line up over the rows: where a slice starts with a negative number, a column is an offset from each row's
    own end; otherwise column j is the j-th of the positions that a row has.

    Args:
        write: (R,) bool: the rows that must have the positions.
        start, stop: (b,) first position of each row, and one past its last. ends: what negative positions count from.
    Raises:
        AddressError: a row that must have a position has it not, or has one twice.
    """
    sel, found = address.pos, dict[tuple[object, ...], dict[int, int]]()  # rows that are alike are looked at once
    from_end = isinstance(sel, Span) and sel.from_end
    bounds = [*zip(start.tolist(), stop.tolist(), ends.tolist(), strict=True)]
    kinds = [(*bounds[row], needed) for row, needed in zip(rows, write.tolist(), strict=True)]
    for row, kind in zip(rows, kinds, strict=True):
        if kind in found:
            continue
        first, last, origin, needed = kind[0], kind[1] - 1, kind[2], kind[3]
        if isinstance(sel, Span):
            ends_at = [None if v is None else max(v + origin, 0) if v < 0 else v for v in (sel.start, sel.stop)]
            here = [p for p in range(last + 1)[ends_at[0] : ends_at[1] : sel.step] if p >= first]
        else:
            here = [p + origin if p < 0 else p for p in ([sel] if isinstance(sel, int) else sel)]
            outside = [p for p in here if not first <= p <= last]
            if outside and needed:
                raise AddressError(
                    f"{source}: row {row} has no position {outside[0]}; this run has its positions {first}..{last}."
                )
            here = [] if outside else here
        if not here and needed:
            raise AddressError(
                f"{source}: the slice {sel} selects nothing of row {row}; this run has its positions {first}..{last}."
            )
        if len(set(here)) != len(here):
            raise AddressError(f"{source} names the same position of row {row} twice.")
        found[kind] = {p - origin if from_end else count: p for count, p in enumerate(here)}
    columns = sorted({column for places in found.values() for column in places})
    lines = {kind: [places.get(column, -1) for column in columns] for kind, places in found.items()}
    return torch.tensor([lines[kind] for kind in kinds], dtype=torch.long)


def same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are one memory."""
    return b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()


def spacious(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory that is written for the first time; on a CPU in large pages, which numpy asks for and torch does not.

    To touch 64 MB for the first time takes 7 ms in them, 23 to 31 in small ones (one core of an AMD EPYC).
    """
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, str(like.dtype).removeprefix("torch.")))


def fit(source: object, value: Tensor, full: list[int], gone: list[bool]) -> Tensor:
    """View a value as (layers, rows, positions, *features) with 1 where it broadcasts.

    Raises:
        ShapeMismatch: it cannot be.
    """
    shown = [size for size, g in zip(full, gone, strict=True) if not g]
    tail = [size for size, g in zip(full[3:], gone[3:], strict=True) if not g]
    given = list(value.shape)
    if not given:
        return value.reshape([1] * len(full))
    if given == tail or len(given) == len(shown):
        target = [1] * (len(shown) - len(tail)) + tail if given == tail and len(given) != len(shown) else given
        if all(g in (1, s) for g, s in zip(target, shown, strict=True)):
            sizes = iter(target)
            return value.reshape([1 if g else next(sizes) for g in gone])
    raise ShapeMismatch(
        f"{source}: the value is {tuple(given)}; the place is {tuple(shown)}. A value has that shape (1 where it is "
        f"the same along an axis), or {tuple(tail)} for all rows and positions alike, or is one number."
    )


def fit_basis(source: object, value: Tensor, full: list[int], gone: list[bool]) -> Tensor:
    """A Project's basis (m, *features) as it is; raise ShapeMismatch if it does not fit the place."""
    tail = [size for size, g in zip(full[3:], gone[3:], strict=True) if not g]
    if list(value.shape[1:]) != tail:
        raise ShapeMismatch(
            f"{source}: a basis here is (m, {', '.join(map(str, tail))}); this one is {tuple(value.shape)}."
        )
    return value
