"""`patch_grid`: one patch for every cell of a grid of layers, positions and parts of a site."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from kernels_bridge import resolve as resolve_backend
from minimal_mamba import Add, Address, Edit, Mamba, Set, Zero, at
from minimal_mamba.address import Span, named_site, resolve, selector
from minimal_mamba.errors import AddressError, EditError, InputError, nearest
from minimal_mamba.provenance import model_digest
from minimal_mamba.sites import ADDRESSABLE

from ..ablation import set_where
from ..positions import from_start
from ..run import Lengths, Metric, donor_of, known, run
from .engine import MEMORY, run_cells
from .grid import Grid, Layers
from .parts import Part, check
from .store import function, save_grid

Source = str | Callable[[Address], Edit | Iterable[Edit]]
LayerSpec = int | slice | Sequence[int | slice | Sequence[int]] | None
PosSpec = int | slice | Sequence[int] | None
SOURCES = ("donor", "mean", "zero", "noise")


@overload
def patch_grid(
    model: Mamba, ids: Tensor, donor_ids: Tensor | None = None, *, site: str, metric: Metric,
    layers: LayerSpec = None, positions: PosSpec = None, parts: Mapping[str, Part] | None = None,
    source: Source = "donor", std: float = 1.0, seed: int = 0, both: bool = False, lengths: Lengths = None,
    backend: str = "auto", memory: int = MEMORY, path: str | Path | None = None, progress: bool = True,
) -> Grid: ...  # fmt: skip
@overload
def patch_grid(
    model: Mamba, ids: Tensor, donor_ids: Tensor | None = None, *, site: str, metric: Mapping[str, Metric],
    layers: LayerSpec = None, positions: PosSpec = None, parts: Mapping[str, Part] | None = None,
    source: Source = "donor", std: float = 1.0, seed: int = 0, both: bool = False, lengths: Lengths = None,
    backend: str = "auto", memory: int = MEMORY, path: str | Path | None = None, progress: bool = True,
) -> dict[str, Grid]: ...  # fmt: skip
@torch.no_grad()
def patch_grid(
    model: Mamba,
    ids: Tensor,
    donor_ids: Tensor | None = None,
    *,
    site: str,
    metric: Metric | Mapping[str, Metric],
    layers: LayerSpec = None,
    positions: PosSpec = None,
    parts: Mapping[str, Part] | None = None,
    source: Source = "donor",
    std: float = 1.0,
    seed: int = 0,
    both: bool = False,
    lengths: Lengths = None,
    backend: str = "auto",
    memory: int = MEMORY,
    path: str | Path | None = None,
    progress: bool = True,
) -> Grid | dict[str, Grid]:
    """Put another value of a site into the base run, one layer, position and part at a time.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row. A donor is needed for `source="donor"`; with any
            other source it only gives what `recovered` normalises by.
        site: any site, or "recurrent_state".
        metric: logits (b, l, v) -> (b,), or several by name; with `lengths` it is given each row's last token,
            (b, 1, v). What it costs to read more than the last position: see `sweep`.
        layers: the grid's rows, an int, a slice or a list; a tuple of layers in a list is patched at once. All, one by
            one, if None.
        positions: the grid's columns, an int, a slice or a list, as in `at`; all if None. Where `lengths` differ,
            negative ints count from each row's own end, and None and slices mean the positions that every row has,
            0 to min(lengths) - 1.
        parts: what of the site is patched, by name: fields of an address ({"e": [0, 1]}, {"n": 3}), or a mask of bools
            (*features) or (n_layer, *features). `groups` and `bands` make them. The whole site if None.
        source: "donor"; "mean", of the base run over the batch; "zero"; "noise", normal with `std`, added, drawn from
            `seed` and the place (of which no other source takes any); or a function from an address to the edits
            there, such as `ablate`.
        both: also patch the base's values into the donor run: `Grid.noising`.
        lengths: (b,) tokens in each row, the same in base and donor.
        memory, path: as in `sweep`.
    Returns:
        Grid, or one for each name; every cell equals one run under that edit.
    Raises:
        AddressError: a layer or position that some row has not; a slice from the end where `lengths` differ.
        InputError: donor_ids of another shape, or missing; what `sweep` raises.
    Cost: for each cell about a third of a forward, nothing before the first token in which donor and base differ; see
        `sweep`. The source's values at all cells are held.
    """
    known(model)
    named_site(site)
    ids, sizes = model.check(ids, lengths)
    if donor_ids is not None:
        donor_ids = donor_of(model, ids, donor_ids)
    _check_source(source, donor_ids, both, len(ids))
    if source != "noise" and (std, seed) != (1.0, 0):
        raise EditError(f"std={std}, seed={seed} are of source='noise'; source={source!r} draws nothing.")
    rows, columns = chosen_layers(layers, site, model.config.n_layer), chosen_positions(positions, sizes)
    if parts is not None and not isinstance(parts, Mapping):
        raise EditError(f"parts={parts!r:.80}: give them by name, as in {{'first': {{'n': [0, 1]}}}}.")
    chosen = {name: check(model, site, name, part) for name, part in (parts or {}).items()}
    if parts is not None and not parts:
        raise EditError("parts is empty: name at least one, or give None for the whole site.")
    names: tuple[Layers, ...] = tuple(row[0] if len(row) == 1 else tuple(row) for row in rows if row) or (0,)
    several: Mapping[str, Metric] = metric if isinstance(metric, Mapping) else {"metric": metric}

    def one_way(base: Tensor, other: Tensor | None, folder: Path | None) -> dict[str, Grid]:
        values = _Values(model, base, other, site, rows, columns, source, std, seed, lengths, backend)
        every: list[Part | None] = [*chosen.values()] or [None]
        cells = [values.edits(row, pos, part) for row in rows for pos in columns for part in every]
        del values
        done = run_cells(model, base, cells, several, lengths, backend, memory, progress, folder)
        gap = None if other is None else run_cells(model, other, [], several, lengths, backend, memory, False, None)
        shape = (len(rows), len(columns), *([len(chosen)] if chosen else []))
        return {
            name: Grid(
                out.values.unflatten(0, shape), out.base,
                torch.full_like(out.base, torch.nan) if gap is None else gap[name].base,
                site, names, tuple(columns), tuple(chosen) or None,
            )
            for name, out in done.items()
        }  # fmt: skip

    folder = None if path is None else Path(path)
    made = one_way(ids, donor_ids, folder)
    recipe = {
        "model": model_digest(model) if folder else None, "site": site, "layers": names if rows[0] else None,
        "positions": columns, "source": f"function {function(source)}" if callable(source) else source, "std": std,
        "parts": {name: None if isinstance(part, Tensor) else dict(part) for name, part in chosen.items()},
        "seed": seed, "both": both, "backend": resolve_backend(backend, model.device).name, "memory": memory,
        "named": isinstance(metric, Mapping),
    }  # fmt: skip
    inputs = {"ids": ids, "donor_ids": donor_ids, "lengths": None if lengths is None else sizes}
    inputs |= {f"part/{name}": part for name, part in chosen.items() if isinstance(part, Tensor)}
    given = {name: x for name, x in inputs.items() if x is not None}
    if folder:
        save_grid(folder, made, recipe, given)
    if both:
        assert donor_ids is not None
        back = one_way(donor_ids, ids, None if folder is None else folder / "noising")
        if folder:
            save_grid(folder / "noising", back, recipe, given)
        made = {name: replace(grid, noising=back[name]) for name, grid in made.items()}
    return made if isinstance(metric, Mapping) else made["metric"]


def _check_source(source: Source, donor_ids: Tensor | None, both: bool, b: int) -> None:
    if not callable(source) and source not in SOURCES:
        raise EditError(
            f"source={source!r}:{nearest(str(source), SOURCES)} There are {', '.join(SOURCES)}, or a function from an "
            "address to an edit."
        )
    if donor_ids is None and (source == "donor" or both):
        raise InputError("a donor is needed: give donor_ids, or source='mean', 'zero', 'noise' or a function.")
    if both and source != "donor":
        raise EditError(f"both=True swaps base and donor, so it goes with source='donor', not {source!r}.")
    if source == "mean" and b == 1:
        raise InputError("the mean over a batch of one row changes nothing: give more rows, or another source.")


class _Values:
    """What a sweep puts in, cell by cell."""

    def __init__(
        self, model: Mamba, ids: Tensor, donor_ids: Tensor | None, site: str, rows: list[list[int]],
        columns: list[int], source: Source, std: float, seed: int, lengths: Lengths, backend: str,
    ):  # fmt: skip
        self.where, self.source, self.std, self.seed = getattr(at, site), source, std, seed
        self.b = len(ids)
        self.sizes = [model.config.size(axis) for axis in ADDRESSABLE[site].features]
        self.axes = ADDRESSABLE[site].features
        self.held: dict[tuple[int | None, int], Tensor] = {}  # of a layer and a position, (b, *features)
        self.shared: set[int] = set()  # positions up to which base and donor are the same tokens
        if source == "donor" and donor_ids is not None:
            _, sizes = model.check(ids, lengths)
            same = (ids == donor_ids).cumprod(1).sum(1).cpu()  # (b,) tokens before the first that differs
            self.shared = {p for p in columns if bool((from_start(p, sizes) < same).all())}
            columns = [p for p in columns if p not in self.shared]
        if source in ("donor", "mean"):
            used = sorted({layer for row in rows for layer in row})
            layers: list[int | None] = [*used] or [None]
            # apart, because in a short row one from the start and one from the end may be the same
            halves = [h for h in ([p for p in columns if p >= 0], [p for p in columns if p < 0]) if h]
            places = [self.places(used, half) for half in halves]
            given = ids if source == "mean" or donor_ids is None else donor_ids
            every = [a for half in places for a in half]
            made = run(model, given, record=every, lengths=lengths, backend=backend, last_only=True).records
            for half, addresses in zip(halves, places, strict=True):
                for layer, place in zip(layers, addresses, strict=True):
                    self.held |= {(layer, pos): value for pos, value in zip(half, made[place].unbind(1), strict=True)}

    def places(self, layers: list[int], pos: int | list[int], **fields: list[int]) -> list[Address]:
        if not layers:
            return [self.where(pos=pos, **fields)]
        return [self.where(layer=layer, pos=pos, **fields) for layer in layers]

    def edits(self, layers: list[int], pos: int, part: Part | None) -> list[Edit]:
        """The edits of one cell; none where base and donor are still the same."""
        if pos in self.shared:
            return []
        fields: dict[str, list[int]] = {}
        if isinstance(part, Mapping):
            fields = {axis: sel for axis, sel in part.items() if isinstance(sel, list)}
        mask = part if isinstance(part, Tensor) else None
        made: list[Edit] = []
        for i, place in enumerate(self.places(layers, pos, **fields)):
            own = None if mask is None else mask[layers[i] if layers else 0]
            made += self._edit(place, layers[i : i + 1], pos, fields, own)
        return made

    def _edit(
        self, place: Address, layer: list[int], pos: int, fields: dict[str, list[int]], mask: Tensor | None
    ) -> list[Edit]:
        if callable(self.source):
            if mask is not None:
                raise EditError("a function cannot edit the part that a mask names; name fields, as in {'n': [0, 1]}.")
            made = self.source(place)
            return [made] if isinstance(made, Edit) else list(made)
        if self.source == "zero":
            return [Zero(place)] if mask is None else set_where(place, mask, 0.0)
        if self.source == "noise":
            drawn = self._noise(place, fields)
            return [Add(place, drawn if mask is None else drawn * mask.cpu())]
        value = self.held[layer[0] if layer else None, pos]  # (b, *features)
        if self.source == "mean":
            value = value.mean(0, keepdim=True)
        for axis, sel in fields.items():
            value = value.index_select(1 + self.axes.index(axis), torch.tensor(sel, device=value.device))
        return [Set(place, value)] if mask is None else set_where(place, mask, value)

    def _noise(self, place: Address, fields: dict[str, list[int]]) -> Tensor:
        """(b, *features), a function of the seed and the place alone."""
        key = hashlib.sha256(f"{self.seed} {place}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        shape = [len(fields.get(axis, range(size))) for axis, size in zip(self.axes, self.sizes, strict=True)]
        return self.std * torch.randn(self.b, *shape, generator=rng, dtype=torch.float64)


def chosen_layers(layers: object, site: str, n_layer: int) -> list[list[int]]:
    """The layers of each of the grid's rows; one row without layers for a site of the whole model."""
    if not ADDRESSABLE[site].layered:
        if layers is not None:
            raise EditError(f"layers={layers!r}: {site} is no part of a layer.")
        return [[]]
    if not isinstance(layers, Iterable):
        return [[i] for i in resolve(selector(slice(None) if layers is None else layers, "layer"), n_layer, "layer")]
    groups = [resolve(selector(group, "layer"), n_layer, "layer") for group in layers]
    if not groups:
        raise EditError(f"layers={layers!r}: name at least one.")
    return groups


def chosen_positions(positions: object, sizes: Tensor) -> list[int]:
    """The positions to patch, as `at` takes them: from the start, or, where the rows' lengths differ, as they are."""
    chosen = selector(slice(None) if positions is None else positions, "pos")
    shortest = int(sizes.min())
    if bool((sizes == shortest).all()):
        return resolve(chosen, shortest, "pos")
    if isinstance(chosen, Span):
        if min(chosen.start or 0, chosen.stop or 0) < 0:
            raise AddressError(
                f"pos: the rows have lengths {sizes.tolist()}, so the slice {chosen} is another one in each; "
                "name the positions, as in positions=[-2, -1]."
            )
        return resolve(chosen, shortest, "pos")
    named = [chosen] if isinstance(chosen, int) else list(chosen)
    for pos in named:
        resolve(pos, shortest, "pos")  # raises for what the shortest row has not
    return named
