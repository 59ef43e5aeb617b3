"""Parts of a site that a sweep patches one by one: groups of channels or dimensions, bands of decay rates."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minimal_mamba import Mamba
from minimal_mamba.address import resolve, selector
from minimal_mamba.errors import EditError, InputError, ShapeMismatch
from minimal_mamba.sites import ADDRESSABLE

from ..timescales import decay_bands

Part = Mapping[str, object] | Tensor  # fields of an address, such as {"e": slice(8), "n": [0]}, or a mask of bools


def groups(model: Mamba, axis: str, size: int = 1) -> dict[str, Part]:
    """The indices of a feature axis (`e`, `n`, `d`, ...) in runs of `size`, each a part: `patch_grid(parts=...)`."""
    total = model.config.size(axis)
    if size < 1:
        raise InputError(f"size={size}: at least 1.")
    names = {i: f"{axis} {i}" if size == 1 else f"{axis} {i}-{min(i + size, total) - 1}" for i in range(0, total, size)}
    return {name: {axis: slice(i, min(i + size, total))} for i, name in names.items()}


def bands(model: Mamba, cuts: int | Sequence[float] = 4, *, dt: Tensor | float | None = None) -> dict[str, Part]:
    """Parts of `ssm_state`, and of every site with axes e n, by how long they remember: `decay_bands` of each layer.

    Args:
        cuts: how many bands of equal size, or rising half-lives in tokens at which to cut. dt: as in `half_lives`.
    Returns:
        Masks (n_layer, e, n), the fastest to forget first; bands that are empty in all layers are left out.
    """
    of_layers = [decay_bands(model, i, cuts, dt=dt) for i in range(model.config.n_layer)]
    masks = [torch.stack(same) for same in zip(*of_layers, strict=True)]
    if isinstance(cuts, int):
        names = [f"band {i + 1} of {cuts}" for i in range(cuts)]
    else:
        between = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(cuts)]
        names = [f"half-life {name}" for name in (f"< {cuts[0]:g}", *between, f">= {cuts[-1]:g}")]
    return {name: mask for name, mask in zip(names, masks, strict=True) if bool(mask.any())}


def check(model: Mamba, site: str, name: str, part: Part) -> Part:
    """A part as indices of each axis that it names, or as a mask (n_layer, *features); raises what does not fit."""
    spec = ADDRESSABLE[site]
    sizes = [model.config.size(axis) for axis in spec.features]
    if isinstance(part, Tensor):
        shapes = (tuple(sizes), (model.config.n_layer, *sizes))
        if part.dtype != torch.bool or tuple(part.shape) not in shapes or not bool(part.any()):
            raise ShapeMismatch(
                f"part {name!r} is a mask {tuple(part.shape)} of {part.dtype}; a mask of {site} is of bools, "
                f"{shapes[0]} or, layer by layer, {shapes[1]}, and not empty."
            )
        return part.expand(shapes[1])
    known = [axis for axis in spec.features if axis != "n+k"]
    if not isinstance(part, Mapping) or not part or not set(part) <= set(known):
        raise EditError(f"part {name!r}: {part!r} names no axes of {site}, such as {{{known[0]!r}: [0, 1]}}.")
    return {axis: resolve(selector(sel, axis), model.config.size(axis), axis) for axis, sel in part.items()}
