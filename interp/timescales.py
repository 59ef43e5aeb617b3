"""Time scales: how long the state remembers, how far back a layer looks, what is written, kept and read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Address, Edit, Mamba, MambaState, at
from minimal_mamba.address import EVERYTHING
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import InputError

from .positions import along, local, of_tokens, one_layer, one_position, present, tokens
from .recurrence import outside, recurrence, recurrence_sites
from .run import Lengths, Metric, gradients, known, run


@torch.no_grad()
def typical_dt(model: Mamba) -> Tensor:
    """The step size of each channel without data: softplus of dt_proj's bias, what dt is where dt_low is 0.

    A FalconMamba divides dt_low by its root mean square, so that it is nowhere near 0 there: take `mean_dt` of a run.

    Returns:
        (layers, e), > 0.
    """
    known(model)
    biases = [layer.mixer.dt_proj.bias.to(wide(model.dtype)) for layer in model.backbone.layers]
    return F.softplus(torch.stack(biases))


@torch.no_grad()
def mean_dt(
    model: Mamba, ids: Tensor, *, edits: Edit | Iterable[Edit] = (), lengths: Lengths = None,
    state: MambaState | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The mean step size of each channel over all tokens of a run.

    Returns:
        (layers, e), > 0 unless an edit stops time.
    Cost: one forward; dt of all layers, (layers, b, l, e).
    """
    out = run(model, ids, edits, record=[at.dt()], backend=backend, state=state, lengths=lengths, last_only=True)
    return of_tokens(out, at.dt()).mean(1)


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
    known(model)
    c = model.config
    try:
        given = typical_dt(model) if dt is None else torch.as_tensor(dt, dtype=wide(model.dtype), device=model.device)
    except (TypeError, ValueError):
        raise InputError(f"dt={dt!r:.60} is no step size; give one number, or what mean_dt gives.") from None
    if given.shape not in ((), (c.d_inner,), (c.n_layer, c.d_inner)) or not bool((given >= 0).all()):
        raise InputError(
            f"dt has shape {tuple(given.shape)}, smallest {float(given.min()):.3g}; give one number, ({c.d_inner},) "
            f"or ({c.n_layer}, {c.d_inner}), none below 0."
        )
    rates = -torch.stack([layer.mixer.A(given.dtype) for layer in model.backbone.layers])  # (layers, e, n)
    return math.log(2) / (given.expand(c.n_layer, c.d_inner)[..., None] * rates)


def decay_bands(
    model: Mamba, layer: int, bands: int | Sequence[float] = 4, *, dt: Tensor | float | None = None
) -> list[Tensor]:
    """Group a layer's (channel, dimension) pairs by how long they remember, the fastest to forget first.

    A band is a set of pairs and not a product of channels and dimensions, so it is a mask: `mask.nonzero()` are its
    pairs, `ablate(at.ssm_state(layer=...), mask=mask)` zeroes it, `set_where(at.ssm_state(layer=...), mask, value)`
    writes into it.

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
    index = one_layer(model, layer)
    life = half_lives(model, dt)[index]  # (e, n)
    if isinstance(bands, int | np.integer):
        if isinstance(bands, bool) or not 1 <= bands <= life.numel():
            raise InputError(f"bands={bands}: give 1 to {life.numel()}, the number of pairs, or half-lives to cut at.")
        order = life.flatten().argsort(stable=True)
        parts = [order.new_zeros(life.numel(), dtype=torch.bool) for _ in range(bands)]
        for part, chosen in zip(parts, order.tensor_split(bands), strict=True):
            part[chosen] = True
        return [part.reshape(life.shape) for part in parts]
    try:
        cuts = [float(cut) for cut in bands]
    except (TypeError, ValueError):
        raise InputError(f"bands={bands!r:.60}: a number of bands, or the half-lives to cut at, in tokens.") from None
    if not cuts or not all(a < b for a, b in zip([0.0, *cuts], cuts, strict=False)):
        raise InputError(f"bands={list(bands)}: the half-lives to cut at are above 0 and rise.")
    which = torch.bucketize(life, torch.tensor(cuts, dtype=life.dtype, device=life.device), right=True)
    return [which == i for i in range(len(cuts) + 1)]


@dataclass(frozen=True, eq=False, repr=False)
class ReceptiveField(Brief):
    """How much of what is read comes from how far back.

    Args:
        share: (b, l) by distance, 0 is the token itself; 0 beyond a row's first token.
        before: (b,) share of the memory that the run began with. All shares of a row sum to 1, or are NaN where
            nothing is read at all.
        layer: whose scan it is; None through all of them.
    """

    share: Tensor
    before: Tensor
    layer: int | None = None

    def mean_distance(self) -> Tensor:
        """(b,) the mean distance in tokens, over what came from this run's tokens."""
        distance = torch.arange(self.share.shape[1], dtype=self.share.dtype, device=self.share.device)
        return (self.share * distance).sum(1) / self.share.sum(1)

    def width(self, part: float = 0.9) -> Tensor:
        """(b,) the smallest distance within which at least this part of all that is read lies.

        inf where more than the rest was read from the memory that the run began with; NaN where the shares are.
        """
        if not 0 < part <= 1:
            raise InputError(f"part={part}: a share above 0 and up to 1, such as 0.9.")
        share = self.share.double()
        beyond = torch.cat([share[:, 1:].flip(1).cumsum(1).flip(1), share.new_zeros(len(share), 1)], 1)
        rounding = max(1e-12, torch.finfo(self.share.dtype).eps)
        inside = beyond + self.before[:, None].double() <= (0.0 if part == 1 else 1 - part + rounding)
        first = inside.to(torch.int8).argmax(1).to(self.share.dtype)
        return torch.where(inside.any(1), first, torch.inf).masked_fill(self.share.isnan().any(1), torch.nan)


@torch.no_grad()
def receptive_field(
    model: Mamba, ids: Tensor, layer: int, *, pos: int = -1, edits: Edit | Iterable[Edit] = (),
    lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> ReceptiveField:  # fmt: skip
    """How far back a layer's scan reads at one position: the sizes of each earlier token's part of y_t.

        share_j ~ sum_e |sum_n C_t[n] prod_{t-j < r <= t} decay_r[e, n] write_{t-j}[e, n]|

    Args:
        pos: an int, as in `at`; -1 is each row's last token.
    Returns:
        ReceptiveField, of distances 0 .. l - 1.
    Raises:
        EditError: an edit inside this layer's recurrence, and what `run` raises.
    Cost: one forward and l steps of (b, e, n); nothing of size (l, l).
    """
    index, pos = one_layer(model, layer), one_position(pos)
    edits = outside(edits, [index], model.config.n_layer)
    read = at.C(layer=index, pos=pos)
    out = run(model, ids, edits, [*recurrence_sites(index), read], backend, state, lengths=lengths, last_only=True)
    r, t = recurrence(model, out, index, state), local(out, pos, state)
    weight = out[read].to(r.A.dtype)[:, None].expand_as(r.h0)
    *sizes, before = [share.sum(-1).abs().sum(-1) for _, share in r.sources(weight, t)]
    size = torch.stack(sizes, 1)  # (b, max(t) + 1)
    total = size.sum(1) + before
    share = F.pad(size, (0, out.ids.shape[1] - size.shape[1])) / total[:, None]
    return ReceptiveField(share, before / total, index)


def gradient_field(
    model: Mamba, ids: Tensor, metric: Metric, *, site: Address | None = None,
    edits: Edit | Iterable[Edit] = (), lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> ReceptiveField:  # fmt: skip
    """How far back a metric looks through all layers: the norms of its gradient in each token's embedding.

        share_j ~ |d metric / d embed_{t-j}|, t each row's last token

    Args:
        metric: logits (b, l, v) -> (b,), as for `gradients`. site: another site along the sequence, all its positions.
    Returns:
        ReceptiveField; `before` is 0: the gradient in a carried state is not a token's.
    Raises:
        InputError: a site that is not one vector a position, and what `gradients` raises.
    Cost: one forward and one backward.
    Source: the effective receptive field of Luo et al. 2016 (arXiv:1701.04128), with norms for central pixels' values.
    """
    known(model)
    site = at.embed() if site is None else site
    ids, sizes = model.check(ids, lengths, state)
    axes = sum(not isinstance(f, int) for f in site.features)
    if site.pos != EVERYTHING or axes != 1 or site.layer_axis:
        raise InputError(f"site={site}: name a site with one vector a position, of one layer, and all positions.")
    found = gradients(model, ids, metric, wrt=[site], edits=edits, lengths=lengths, state=state, backend=backend)[site]
    norms = along(found.norm(dim=-1), ids.shape[1])  # (b, l)
    back = (sizes[:, None] - 1 - torch.arange(ids.shape[1])).to(norms.device)  # the position at each distance
    size = torch.where(back >= 0, norms.gather(1, back.clamp(min=0)), 0.0)
    return ReceptiveField(size / size.sum(1, keepdim=True), torch.zeros_like(size[:, 0]))


@dataclass(frozen=True, eq=False, repr=False)
class Flow(Brief):
    """What a layer's state takes in, keeps and gives, by position and channel, each (b, l, e); 0 on padding.

    Args:
        write, keep, state: norms over n of dt B u, of decay h_{t-1}, and of their sum h_t.
        from_write, from_keep: what C reads of either; their sum is y.
    """

    write: Tensor
    keep: Tensor
    state: Tensor
    from_write: Tensor
    from_keep: Tensor


@torch.no_grad()
def state_flow(
    model: Mamba, ids: Tensor, layer: int, *, edits: Edit | Iterable[Edit] = (),
    lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> Flow:  # fmt: skip
    """Split each state, and what is read of it, into what this token wrote and what was kept of the past.

        h_t = write_t + keep_t, keep_t = decay_t h_{t-1}        y_t = C_t write_t + C_t keep_t

    Raises:
        EditError: an edit inside this layer's recurrence, and what `run` raises.
    Cost: one forward and l steps of (b, e, n).
    """
    index = one_layer(model, layer)
    edits = outside(edits, [index], model.config.n_layer)
    out = run(model, ids, edits, recurrence_sites(index), backend, state, lengths=lengths, last_only=True)
    r = recurrence(model, out, index, state)
    h, steps = r.h0, []
    for dt, u, B, C in zip(r.dt.unbind(1), r.u.unbind(1), r.B.unbind(1), r.C.unbind(1), strict=True):
        write = einsum(dt * u, B, "b e, b n -> b e n")
        keep = torch.exp(dt[:, :, None] * r.A) * h
        h = write + keep
        norms = [part.norm(dim=-1) for part in (write, keep, h)]
        steps.append(torch.stack([*norms, *(einsum(part, C, "b e n, b n -> b e") for part in (write, keep))]))
    return Flow(*torch.where(tokens(out)[:, :, None], torch.stack(steps, 2), 0.0).unbind(0))


@dataclass(frozen=True, eq=False, repr=False)
class Rank(Brief):
    """How many directions the samples fill.

    Args:
        participation: (...) participation ratio (sum s^2)^2 / sum s^4, 1 to the number of directions; 0 if all is 0.
        above: (...) how many singular values are above the threshold times the largest.
        spectrum: (..., min(m, f)) singular values s, falling.
    """

    participation: Tensor
    above: Tensor
    spectrum: Tensor


@torch.no_grad()
def effective_rank(samples: Tensor, *, centre: bool = True, threshold: float = 0.01) -> Rank:
    """The effective rank of m samples of f numbers, (..., m, f), in float32 or wider.

    Args:
        centre: take the samples' mean off first; of a state matrix (e, n) itself, as in
            `effective_rank(run_[at.ssm_state(layer=3, pos=7)], centre=False)`, leave it.
        threshold: of `above`, relative to the largest singular value.
    Cost: one singular value decomposition, m f min(m, f).
    Source: participation ratio as in Gao et al. 2017 (doi:10.1101/214262), of the covariance's eigenvalues s^2.
    """
    samples = torch.as_tensor(samples)
    samples = samples.to(wide(samples.dtype))
    if samples.dim() < 2 or not 0 < threshold < 1:
        raise InputError(
            f"samples {tuple(samples.shape)}, threshold={threshold}: (..., m, f), m samples of f numbers, and a share "
            "of the largest singular value between 0 and 1."
        )
    if not samples.numel() or not samples.isfinite().all():
        raise InputError(
            f"samples {tuple(samples.shape)} hold NaN or infinity, or nothing. Of a recording of a padded batch leave "
            "out the positions that a row lacks; if they are all there, the model's numbers overflow."
        )
    if centre and samples.shape[-2] == 1:
        raise InputError("one sample is its own mean, of which it does not differ: give more, or centre=False.")
    spectrum = torch.linalg.svdvals(samples - samples.mean(-2, keepdim=True) if centre else samples)
    largest = spectrum[..., :1]
    share = (spectrum / torch.where(largest > 0, largest, 1.0)) ** 2  # all zero where nothing varies
    participation = share.sum(-1) ** 2 / torch.where(largest[..., 0] > 0, (share**2).sum(-1), 1.0)
    return Rank(participation, (spectrum > threshold * spectrum[..., :1]).sum(-1), spectrum)


@torch.no_grad()
def state_rank(
    model: Mamba, ids: Tensor, layer: int, *, pos: int | slice | Sequence[int] = slice(None), threshold: float = 0.01,
    edits: Edit | Iterable[Edit] = (), lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> Rank:  # fmt: skip
    """The effective rank of a layer's states: a sample is the e n numbers of h at one position of one row, centred.

    Cost: one forward, the states (b, positions, e, n) and their decomposition; name fewer positions where that is much.
    """
    place = at.ssm_state(layer=one_layer(model, layer), pos=pos)
    out = run(model, ids, edits, record=[place], backend=backend, state=state, lengths=lengths, last_only=True)
    states = out[place].flatten(-2)
    samples = states.reshape(-1, states.shape[-1])
    return effective_rank(samples[present(model, out, place, state).flatten()], threshold=threshold)
