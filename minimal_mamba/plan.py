"""A plan: the tap that knows the edits and recordings of one run.

It changes and copies what they name, and afterwards can say that each of them happened. Everything that can be checked
without running is checked when the plan is made.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .address import Address, Span, resolve
from .config import MambaConfig
from .edits import Apply, Edit, Project, cast, edit_or_address
from .errors import AddressError, EditError, NotReached
from .item import Item, fit, fit_basis, positions, same, spacious
from .layer_tap import LayerTap
from .sites import RECURRENT_STATE
from .tap import Tap, Toward


class Plan(Tap):
    """The edits and recordings of one run, resolved and checked.

    Args:
        config: the model's sizes.
        edits, record: edits in their order; addresses to record.
        start, stop: (b,) first position of each row, and one past its last.
        origin: (b,) the end that negative positions count from; `stop` if None.
        moves: of a layer, the move whose gradient is wanted.
    Raises:
        AddressError, ShapeMismatch, EditError: an edit or address that this run cannot honour.
    """

    def __init__(
        self,
        config: MambaConfig,
        edits: Iterable[Edit],
        record: Iterable[Address],
        start: Tensor,
        stop: Tensor,
        origin: Tensor | None = None,
        moves: Mapping[int, Toward] | None = None,
    ):
        self.moves, self.moved = moves or {}, set[int]()  # layers whose scan asked
        self.config, self.start, self.stop = config, start.cpu(), stop.cpu()
        self.origin = self.stop if origin is None else origin.cpu()
        self.record_at = list(dict.fromkeys(record))
        self.items: dict[tuple[str, int | None], list[Item]] = {}
        self.of: dict[int, list[Item]] = {}  # id of an edit or address -> its items
        self._resolved: list[Item] = []  # of every edit in turn, also of one that is named twice
        self._own: Tensor | None = None  # the copy that the edits of the present place write into
        for source in [*edits, *self.record_at]:
            self.of[id(source)] = self._resolve(edit_or_address(source))
            for item in self.of[id(source)]:
                self._add(item)

    def _add(self, item: Item) -> None:
        self._resolved.append(item)
        for layer in item.layers:
            self.items.setdefault((item.site, layer), []).append(item)

    def beside(self, other: "Plan", first: int, taken: Callable[[str, int | None], bool]) -> None:
        """Take in those of another plan's edits whose site and layer are `taken`, at the same absolute positions.

        Args:
            first: which of this plan's rows is row 0 of the other.
        """
        for item in other.edits():
            layers = [layer for layer in item.layers if taken(item.site, layer)]
            if layers:
                self._add(replace(item.of(layers), rows=item.rows + first))

    def edits(self) -> list[Item]:
        """What each edit changes, in order: the sites, layers, rows and positions."""
        return [item for item in self._resolved if item.edit is not None]

    # -- making the plan ------------------------------------------------------------------------------------------

    def _resolve(self, source: Edit | Address) -> list[Item]:
        edit, address = source if isinstance(source, Edit) else None, _address(source)
        b, spec = len(self.start), address.spec
        layers: list[int | None] = [None]
        if address.layer is not None:
            layers = list(_named(address, resolve, address.layer, self.config.n_layer, "layer"))
        chosen = edit.rows if edit else None
        wanted = list(range(b)) if chosen is None else _named(source, resolve, chosen, b, "row")
        whole_batch = edit is not None and edit.over_batch
        if whole_batch and b == 1:
            raise EditError(f"{source}: the mean over a batch of one row changes nothing. Give the mean.")
        rows = list(range(b)) if whole_batch else wanted
        write = torch.tensor([r in wanted for r in rows])
        pos = positions(address, rows, write, source, self.start, self.stop, self.origin)

        sizes = [self.config.size(a) for a in spec.features]
        fields = list(zip(spec.features, address.features, sizes, strict=True))
        index = [_named(source, resolve, sel, size, axis) for axis, sel, size in fields]
        all_features = all(len(i) == size and i == list(range(size)) for i, size in zip(index, sizes, strict=True))
        dropped = (isinstance(address.pos, int), *(isinstance(s, int) for s in address.features))

        value = edit.value if edit else None
        if value is not None:
            full = [len(layers), len(rows), pos.shape[1], *map(len, index)]
            gone = [not address.layer_axis, False, *dropped]
            value = (
                fit_basis(source, value, full, gone) if isinstance(edit, Project) else fit(source, value, full, gone)
            )

        def item(site: str, keep: list[list[int]] | None, part: Tensor | None) -> Item:
            return Item(source, site, layers, torch.tensor(rows), write, pos, keep, dropped, part)

        if address.site != RECURRENT_STATE.name:
            return [item(address.site, None if all_features else index, value)]
        n, parts = self.config.d_state, [value, value]
        if value is not None and value.shape[-1] > 1:
            parts = [value[..., :n], value[..., n:]]
        every = index[0] == list(range(sizes[0]))
        spans = [list(range(n)), list(range(self.config.d_conv))]
        return [
            item(site, None if every else [index[0], span], part)
            for site, span, part in zip(("ssm_state", "conv_state"), spans, parts, strict=True)
        ]

    def shape(self, source: Edit | Address) -> tuple[int, ...]:
        """Shape of what an address of this plan records."""
        items = self.of[id(source)]
        first, address = items[0], _address(source)
        fields = zip(address.spec.features, address.features, strict=True)
        kept = [len(resolve(sel, self.config.size(axis), axis)) for axis, sel in fields]
        full = [len(first.layers), len(first.rows), first.pos.shape[1], *kept]
        gone = [not address.layer_axis, False, *first.dropped]
        return tuple(size for size, g in zip(full, gone, strict=True) if not g)

    def present(self, source: Edit | Address) -> Tensor:
        """(b, positions) bool: which of an address's positions each row has; its recording is NaN at the others."""
        return self.of[id(source)][0].pos >= 0

    def columns(self, source: Edit | Address) -> list[int]:
        """What the columns of a slice's recording are: offsets from the rows' own ends, or counts from its start."""
        pos, sel = self.of[id(source)][0].pos, _address(source).pos
        if not (isinstance(sel, Span) and sel.from_end):
            return [*range(pos.shape[1])]
        return (pos - self.origin[:, None]).where(pos >= 0, -self.origin.max() - 1).amax(0).tolist()

    # -- during the run -------------------------------------------------------------------------------------------

    def begin(self, start: Tensor, lengths: Tensor) -> None:
        for item in self._resolved:
            item.begin(start.cpu(), lengths.cpu())

    def end(self, stop: Tensor) -> None:
        """The rows have no positions from `stop` (b,) on, as was not known when the plan was made."""
        for item in self._resolved:
            item.end(stop)

    def at_layer(self, layer: int) -> "Tap":
        return LayerTap(self, layer)

    def touches(self, *sites: str) -> bool:
        return any(item.live for (site, _), items in self.items.items() if site in sites for item in items)

    def beyond(self, origin: Tensor) -> set[int]:
        """How far from the positions `origin` (b,) of its rows something happens: 0 is there, 1 at the next token."""
        return {int(t) for item in self._resolved for t in (item.pos - origin[item.rows, None])[item.pos >= 0].unique()}

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        return self.pass_by(site, None, value, t)

    def pass_by(self, site: str, layer: int | None, value: Tensor, t: int | None) -> Tensor:
        """Apply the edits of this place in their order, probes after them; then record."""
        items = self.items.get((site, layer))
        if not items:
            return value
        self._own = None
        for item in [*(i for i in items if i.is_edit), *(i for i in items if i.is_probe)]:
            value = self._edit(item, layer, value) if t is None else self._edit_at(item, layer, value, t)
        self._own = None
        for item in items:
            if item.edit is None:
                self._record(item, layer, value) if t is None else self._record_at(item, layer, value, t)
        return value

    def _put(self, value: Tensor, where: tuple[Tensor, ...], new: Tensor) -> Tensor:
        """`value` with `new` there. The first edit of a place copies it; the next ones write into that copy."""
        if value is self._own:
            return value.index_put_(where, new)
        self._own = value.index_put(where, new)
        return self._own

    def _edit(self, item: Item, layer: int | None, value: Tensor) -> Tensor:
        if not len(item.cols):
            return value
        assert item.edit is not None
        everywhere = item.covers(value)
        where = () if everywhere else item.index_along(value.device)
        old = value if everywhere else value[where]  # (R, c, *features)
        share = item.share(layer)
        if share is not None and not isinstance(item.edit, Project):  # a basis is the same at every place
            share = share[:, item.cols] if share.shape[1] > 1 else share
            share = cast(item.edit, item.visible(share, 2), old.dtype)
        share = None if share is None else share.to(old.device)
        seen = item.visible(old, 2)
        valid = item.valid.to(value.device)

        def mean() -> Tensor:
            weight = valid.reshape(valid.shape + (1,) * (old.dim() - 2)).to(old.dtype)
            return item.visible((old * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True), 2)

        if isinstance(item.edit, Apply) and not valid.all():
            new = item.row_by_row(item.edit, old)
        else:
            new = item.edit.new(seen, share, mean).to(old.dtype).reshape(old.shape)
        written = item.valid & item.write[:, None]
        item.done += int(written.sum())
        if written.all():
            return new if everywhere else self._put(value, where, new)
        i, c = written.nonzero(as_tuple=True)
        rows, times = item.rows[i], item.local[i, c]
        if item.index is None:
            return self._put(value, (rows.to(value.device), times.to(value.device)), new[i, c])
        spread = (-1,) + (1,) * len(item.index)
        at = (rows.reshape(spread), times.reshape(spread), *item.features(1))
        return self._put(value, tuple(a.to(value.device) for a in at), new[i, c])

    def _edit_at(self, item: Item, layer: int | None, value: Tensor, t: int) -> Tensor:
        if t not in item.by_time:
            return value
        assert item.edit is not None
        i, j = item.by_time[t]
        where = item.index_at(item.rows[i], value)
        if item.edit.blind and item.index is None:  # nothing of what is there is asked but its form
            old = value[:1].expand(len(i), *value.shape[1:])
        else:
            old = value if where is None else value[where]  # (K, *features)
        if isinstance(item.edit, Project):  # a basis is the same at every place
            share = item.value
        elif (share := item.share_at(layer, i, j)) is not None:
            share = cast(item.edit, item.visible(share, 1), old.dtype)
        share = None if share is None else share.to(old.device)
        seen = item.visible(old, 1)
        new = item.edit.new(seen, share, lambda: seen.mean(0, keepdim=True)).to(old.dtype).reshape(old.shape)
        keep = item.write[i]
        item.done += int(keep.sum())
        if keep.all():
            return new if where is None else self._put(value, where, new)
        where = item.index_at(item.rows[i][keep], value)
        assert where is not None
        return self._put(value, where, new[keep.to(new.device)])

    def _record(self, item: Item, layer: int | None, value: Tensor) -> None:
        if not len(item.cols):
            return
        got = value.clone() if item.covers(value) else value[item.index_along(value.device)]
        valid = None if item.valid.all() else item.valid
        self._keep(item, layer, item.cols, valid, got)

    def _record_at(self, item: Item, layer: int | None, value: Tensor, t: int) -> None:
        if t not in item.by_time:
            return
        i, j = item.by_time[t]
        where = item.index_at(item.rows[i], value)
        got = (value.clone() if where is None else value[where])[:, None]  # (K, 1, *features)
        if len(i) == len(item.rows) and bool((j == j[0]).all()):
            return self._keep(item, layer, j[:1], None, got)
        for row, col in zip(i.tolist(), j.tolist(), strict=True):
            valid = torch.zeros(len(item.rows), 1, dtype=torch.bool)
            valid[row] = True
            spread = got.new_zeros((len(item.rows), *got.shape[1:]))
            this = got[(i == row).nonzero()[:, 0].to(got.device)]
            self._keep(item, layer, torch.tensor([col]), valid, spread.index_put((torch.tensor([row]),), this))

    def _keep(self, item: Item, layer: int | None, cols: Tensor, valid: Tensor | None, got: Tensor) -> None:
        item.pieces.setdefault(layer, []).append((cols, valid, got))
        item.done += got.shape[0] * got.shape[1] if valid is None else int(valid.sum())

    def place(self, site: str, layer: int, times: Sequence[int], like: Tensor) -> Tensor | None:
        """The memory of a recording of just these positions, of all rows and channels; None where there is none."""
        for item in self.items.get((site, layer), []) if not torch.is_grad_enabled() else []:
            whole = item.edit is None and item.index is None and item.pos.shape[1] == len(times) == item.local.shape[1]
            if whole and item.valid.all() and (item.local == torch.tensor(times)).all():
                if item.room is None:
                    item.room = spacious((len(item.layers), *item.pos.shape, *like.shape[1:]), like)
                return item.place(layer)
        return None

    def record_many(self, site: str, layer: int | None, values: Tensor, times: Sequence[int]) -> None:
        """Take in recordings that a fast scan made of positions without edits."""
        column = {t: c for c, t in enumerate(times)}
        for item in self.items.get((site, layer), []):
            if item.edit is not None:
                continue
            if same(values, item.place(layer)):
                self._keep(item, layer, item.cols, None, values)
                continue
            regular = item.valid.all() and bool((item.local == item.local[:1]).all())
            mine = [t for t in item.by_time if t in column]
            if not regular or not mine:
                for t in mine:
                    self._record_at(item, layer, values[:, column[t]], t)
                continue
            take = [column[t] for t in mine]
            got = values if take == list(range(values.shape[1])) else values[:, take]
            if item.index is not None:
                chosen: list[slice | Tensor] = [i.to(got.device) for i in item.features(0)]
                got = got[(slice(None), slice(None), *chosen)]
            # of a view the whole would be kept; in inference mode a view does not say that it is one
            if got is not values or values._is_view() or values.is_inference():
                got = got.clone()
            self._keep(item, layer, torch.tensor([int(item.by_time[t][1][0]) for t in mine]), None, got)

    # -- after the run --------------------------------------------------------------------------------------------

    def results(self) -> dict[Address, Tensor]:
        """The recordings; NaN at the positions of a ragged slice that a row does not have.

        Raises:
            NotReached: an edit or a recording, which it names, did not happen everywhere, or happened too often.
        """
        for item in self._resolved:
            if item.done == item.expected:
                continue
            what = f"{'edit' if item.edit else 'recording'} {item.source} happened"
            if item.done > item.expected:
                raise NotReached(
                    f"{what} more often than expected, {item.done} times at {item.expected} places of {item.site!r}. "
                    "A Plan serves one run; make a new one for the next."
                )
            raise NotReached(
                f"{what} at {item.done} of {item.expected} places: the operations in use passed over {item.site!r}. "
                "This is a fault of the backend; run with backend='reference'."
            )
        if missed := set(self.moves) - self.moved:
            raise NotReached(f"the scans of layers {sorted(missed)} passed over a move; run with backend='torch'.")
        return {a: self._assemble(self.of[id(a)]) for a in self.record_at}

    def _assemble(self, items: list[Item]) -> Tensor:
        parts = [item.joined() for item in items]
        wide = parts[0].dtype if len(parts) == 1 else torch.promote_types(parts[0].dtype, parts[1].dtype)
        out = torch.cat([p.to(wide) for p in parts], -1) if len(parts) > 1 else parts[0]  # (layers, b, P, *features)
        gone = [] if _address(items[0].source).layer_axis else [0]
        gone += [2 + a for a, g in enumerate(items[0].dropped) if g]
        return out.squeeze(tuple(gone)) if gone else out


def _address(source: Edit | Address) -> Address:
    return source.address if isinstance(source, Edit) else source


def _named(source: object, fn: Callable[..., list[int]], *args: object) -> list[int]:
    try:
        return fn(*args)
    except AddressError as error:
        raise AddressError(f"{source}: {error}") from None
