"""Time scales: how long each part of the state remembers, how far back a layer looks, what enters, stays and is read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Mamba
from minimal_mamba.address import resolve
from minimal_mamba.block import wide
from minimal_mamba.errors import InputError


@torch.no_grad()
def typical_dt(model: Mamba) -> Tensor:
    """The step size of each channel without data: softplus of dt_proj's bias, what dt is where dt_low is 0.

    Returns:
        (layers, e), > 0.
    """
    biases = [layer.mixer.dt_proj.bias.to(wide(model.dtype)) for layer in model.backbone.layers]
    return F.softplus(torch.stack(biases))


@torch.no_grad()
def half_lives(model: Mamba, dt: Tensor | float | None = None) -> Tensor:
    """How many tokens it takes each (channel, dimension) of the state to forget half of what it holds.

        decay = exp(dt A) = 1/2 after ln 2 / (dt |A|) tokens

    Args:
        dt: step size, one number, (e,) or (layers, e), > 0, such as `mean_dt` of a run; None: `typical_dt`.
    Returns:
        (layers, e, n), tokens; inf where dt is 0.
    Raises:
        InputError: a dt of another shape, or below 0.
    Source: Gu & Dao 2023 (arXiv:2312.00752), Eq. 4 and section 3.5.2.
    """
    c = model.config
    given = typical_dt(model) if dt is None else torch.as_tensor(dt, dtype=wide(model.dtype), device=model.device)
    if given.shape not in ((), (c.d_inner,), (c.n_layer, c.d_inner)) or not bool((given >= 0).all()):
        raise InputError(
            f"dt has shape {tuple(given.shape)}, smallest {float(given.min()):.3g}; give one number, ({c.d_inner},) "
            f"or ({c.n_layer}, {c.d_inner}), none below 0."
        )
    rates = torch.stack([layer.mixer.A_log.to(given.dtype).exp() for layer in model.backbone.layers])  # (layers, e, n)
    return math.log(2) / (given.expand(c.n_layer, c.d_inner)[..., None] * rates)


def decay_bands(
    model: Mamba, layer: int, bands: int | Sequence[float] = 4, *, dt: Tensor | float | None = None
) -> list[Tensor]:
    """Group a layer's (channel, dimension) pairs by how long they remember, the fastest to forget first.

    A band is a set of pairs and not a product of channels and dimensions, so it is a mask: `mask.nonzero()` are its
    pairs, `set_where(at.ssm_state(layer=...), mask, value)` edits it, `Scale(at.ssm_state(layer=...), ~mask)` zeroes it.

    Args:
        bands: how many bands of equal size (where the pairs do not divide evenly, the sizes differ by one; ties go by
            channel, then dimension), or rising half-lives in tokens at which to cut, m of them for m + 1 bands, of
            which some may be empty.
        dt: as in `half_lives`.
    Returns:
        bool masks (e, n); each pair is in exactly one.
    Raises:
        AddressError: a layer that does not exist. InputError: bands that cannot be made.
    """
    index = resolve(layer, model.config.n_layer, "layer")[0]
    life = half_lives(model, dt)[index]  # (e, n)
    if isinstance(bands, int):
        if isinstance(bands, bool) or not 1 <= bands <= life.numel():
            raise InputError(f"bands={bands}: give 1 to {life.numel()}, the number of pairs, or half-lives to cut at.")
        order = life.flatten().argsort(stable=True)
        parts = [order.new_zeros(life.numel(), dtype=torch.bool) for _ in range(bands)]
        for part, chosen in zip(parts, order.tensor_split(bands), strict=True):
            part[chosen] = True
        return [part.reshape(life.shape) for part in parts]
    cuts = [float(cut) for cut in bands]
    if not cuts or not all(a < b for a, b in zip([0.0, *cuts], cuts, strict=False)):
        raise InputError(f"bands={list(bands)}: the half-lives to cut at are above 0 and rise.")
    which = torch.bucketize(life, torch.tensor(cuts, dtype=life.dtype, device=life.device), right=True)
    return [which == i for i in range(len(cuts) + 1)]
