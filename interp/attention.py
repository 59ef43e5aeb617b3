r"""Hidden attention: a layer's output as a weighted sum over the tokens before, which is what a linear scan is.

    scan    y_t = sum_s M_ts u_s,      M_ts = sum_n C_t[n] (prod_{s<r<=t} exp(dt_r A[n])) dt_s B_s[n]
    block   gated_t = sum_q W_tq x_q + constant_t,      mixer_out_t = out_proj(gated_t)

            W_tq = SiLU(z_t) sum_{s=q}^{q+k-1} (M_ts + D [s = t]) sigmoid(conv_s) w[k-1-(s-q)]
            constant_t = SiLU(z_t) sum_s (M_ts + D [s = t]) sigmoid(conv_s) bias

each for every channel; [s = t] is 1 there and 0 elsewhere. Written so, the block holds everything between in_proj and
out_proj: conv and its bias, SiLU(conv) = sigmoid(conv) conv, scan, D and gate. M, sigmoid(conv) and the gate are those
of this run. So the sums are exact for this run's output, and no statement on what would happen with another input: for
that there is `knockout`.

Weights are made backward from each target: the row C_t is multiplied by one token's decay after the other, never
divided, some targets and channels at a time. Nothing of size (e, n, l, l) is ever held.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from minimal_mamba import Mamba, at
from minimal_mamba.address import Selector, resolve, selector
from minimal_mamba.brief import Brief
from minimal_mamba.errors import InputError, nearest

from .positions import on_tokens, one_layer
from .recurrence import Recurrence, recurrence, recurrence_sites
from .run import Lengths, run

FORMS = ("scan", "block")
REDUCTIONS = ("mean", "mean_abs", "norm")
BUDGET = 1 << 23  # bytes of the rows C_t that are carried at a time
TOGETHER = 64  # targets that share the making of the decays, before channels are cut

Chosen = int | slice | Sequence[int] | None


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Brief):
    """The weights with which the targets of one layer read the sources.

    Args:
        weights: (b, t, s, c), 0 where the source is after the target; (b, t, s) if reduced over the channels.
        constant: (b, t, c) what no source carries: the conv's bias. Zero for the scan; None if reduced.
        inputs: (b, s, c) what the weights multiply, u of the scan, x of the block; None if reduced.
        targets, sources: (b, t), (b, s) positions. channels: (c,).
        form: "scan" or "block". reduce: over the channels, or None.
    """

    weights: Tensor
    constant: Tensor | None
    inputs: Tensor | None
    targets: Tensor
    sources: Tensor
    channels: Tensor
    form: str
    reduce: str | None

    def reconstruct(self) -> Tensor:
        """(b, t, c): sum_s weights inputs + constant; with all sources the scan's `y`, or the block's `gated`."""
        if self.inputs is None or self.constant is None:
            raise InputError(f"reduce={self.reduce!r} has summed the channels up; reconstruct needs reduce=None.")
        return torch.einsum("btsc,bsc->btc", self.weights, self.inputs) + self.constant


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(Brief):
    """What each source adds to the `mixer_out` of each target.

    Args:
        values: (b, t, s, d). constant: (b, t, d) what no source carries: biases, and for the scan the target's own D u.
        targets, sources: (b, t), (b, s) positions. form: "scan" or "block".
    """

    values: Tensor
    constant: Tensor
    targets: Tensor
    sources: Tensor
    form: str

    def total(self) -> Tensor:
        """(b, t, d): values summed over the sources, and the constant; `mixer_out` if all sources are there."""
        return self.values.sum(2) + self.constant


@torch.no_grad()
def attention(
    model: Mamba,
    ids: Tensor,
    *,
    layer: int,
    form: str = "block",
    targets: Chosen = None,
    sources: Chosen = None,
    channels: Chosen = None,
    reduce: str | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
    budget: int = BUDGET,
    progress: bool = False,
) -> Attention:
    """The hidden attention of one layer, of the scan alone or of the whole block.

    Args:
        form: "scan", y from u; "block", gated from x.
        targets, sources: positions, as in `at`; negative ones count from a row's own end. All, if None.
        channels: of d_inner; all if None.
        reduce: None keeps the channels. Over the chosen ones "mean" is the mean weight, "mean_abs" the mean of its
            size, and "norm" the size in d_model of what they bring: |out_proj(W_tq x_q)|, for the scan
            |out_proj(gate_t M_ts u_s)|, which unlike the weights counts how large the source is and where it goes.
        budget: bytes of the largest working tensor, beside what is returned.
    Returns:
        Attention.
    Raises:
        InputError: a padded batch whose rows have unequal numbers of targets; a budget below one channel.
    Cost: one forward; then of each target as many steps of (e, n) as there are tokens before it.
    Source: Ali, Zimerman & Wolf 2024 (arXiv:2403.01590) for the scan, with B discretised as here (dt B); Zimerman, Ali
        & Wolf 2024 (arXiv:2405.16504) for the block. Differs: D and the conv's bias are in, which their code leaves
        out, so that the sum is the output; its vector form for one target misses that target's own decay.
    """
    if reduce is not None and reduce not in REDUCTIONS:
        raise InputError(f"reduce={reduce!r}: None, {', '.join(REDUCTIONS)}.{nearest(str(reduce), REDUCTIONS)}")
    parts = _parts(model, ids, layer, form, targets, sources, channels, lengths, backend)
    (b, n_targets), n_sources, width = parts.t.shape, parts.s.shape[1], len(parts.channels)
    with tqdm(total=n_targets * width, desc=f"attention {form}", disable=not progress) as bar:
        if reduce == "norm":
            step = max(1, budget // (b * n_sources * model.config.d_model * parts.dtype.itemsize))
            sizes = [_arriving(parts, m, budget, bar)[0].norm(dim=-1) for m in parts.t.split(step, 1)]
            return Attention(torch.cat(sizes, 1), None, None, parts.t, parts.s, parts.channels, form, reduce)
        weights = parts.x.new_zeros(b, n_targets, n_sources, *([] if reduce else [width]))
        constant = parts.x.new_zeros(b, n_targets, width)
        for m, c in _blocks(parts, parts.t, budget, bar):
            for s, found in _weights(parts, parts.t[:, m], c, constant[:, m, c]):
                if s not in parts.places:
                    continue
                rows, j = parts.places[s]
                if reduce is None:
                    weights[rows, m, j, c] = found[rows]
                else:
                    weights[rows, m, j] += (found[rows].abs() if reduce == "mean_abs" else found[rows]).sum(-1) / width
    if reduce:
        return Attention(weights, None, None, parts.t, parts.s, parts.channels, form, reduce)
    rows, source = torch.arange(b, device=weights.device)[:, None], parts.s.to(weights.device)
    inputs = (parts.r.u if form == "scan" else parts.x)[rows, source]  # (b, s, c)
    return Attention(weights, constant, inputs, parts.t, parts.s, parts.channels, form, reduce)


@torch.no_grad()
def contributions(
    model: Mamba,
    ids: Tensor,
    *,
    layer: int,
    form: str = "block",
    targets: Chosen = None,
    sources: Chosen = None,
    lengths: Lengths = None,
    backend: str = "auto",
    budget: int = BUDGET,
    progress: bool = False,
) -> Contributions:
    """What each source adds to the mixer_out of each target, as vectors in d_model.

        block   out_proj(W_tq x_q)              constant: out_proj(constant_t), and out_proj's bias
        scan    out_proj(gate_t M_ts u_s)       constant: out_proj(gate_t D u_t), and out_proj's bias

    Args:
        targets, sources, lengths, backend, budget: as in `attention`.
    Returns:
        Contributions, (b, t, s, d): for a direct logit attribution apply the last norm and the unembedding.
    Cost: as `attention`, and one product (c, d) a pair.
    """
    parts = _parts(model, ids, layer, form, targets, sources, None, lengths, backend)
    with tqdm(total=parts.t.shape[1] * len(parts.channels), desc="contributions", disable=not progress) as bar:
        values, constant = _arriving(parts, parts.t, budget, bar)
    return Contributions(values, constant, parts.t, parts.s, form)


@dataclass(frozen=True, eq=False)
class _Parts:
    """One layer of a run, of the chosen channels c: what the weights are made of.

    Args:
        r: dt, u (b, l, c), B, C (b, l, n), A (c, n). x, conv, gate: (b, l, c). taps: (c, k). bias, D: (c,).
        out: (d, c) and (d,) or None, of out_proj. t: (b, t), s: (b, s) positions, on the CPU.
        places: of each source its rows and columns.
    """

    form: str
    r: Recurrence
    x: Tensor
    conv: Tensor
    gate: Tensor
    taps: Tensor
    bias: Tensor
    D: Tensor
    out: tuple[Tensor, Tensor | None]
    t: Tensor
    s: Tensor
    channels: Tensor
    places: dict[int, tuple[Tensor, Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


def _parts(
    model: Mamba, ids: Tensor, layer: int, form: str, targets: Chosen, sources: Chosen, channels: Chosen,
    lengths: Lengths, backend: str,
) -> _Parts:  # fmt: skip
    if form not in FORMS:
        raise InputError(f"form={form!r}: {' or '.join(FORMS)}.{nearest(str(form), FORMS)}")
    layer = one_layer(model, layer)
    config = model.config
    ids, sizes = model.check(ids, lengths)
    l = ids.shape[1]
    t = _positions(targets, sizes.tolist(), "targets")
    s = torch.arange(l).expand(len(ids), l) if sources is None else _positions(sources, sizes.tolist(), "sources")
    c = torch.tensor(resolve(selector(slice(None) if channels is None else channels, "e"), config.d_inner, "e"))
    sites = [at.x(layer=layer), at.conv(layer=layer), at.gate(layer=layer)]
    made = run(model, ids, record=[*sites, *recurrence_sites(layer)], lengths=lengths, backend=backend, last_only=True)
    r = recurrence(model, made, layer, None)
    w, here = r.dt.dtype, c.to(r.dt.device)
    x, conv, gate = (on_tokens(made, site).to(w)[..., here] for site in sites)
    mixer = model.backbone.layers[layer].mixer
    bias = torch.zeros_like(mixer.D) if mixer.conv1d.bias is None else mixer.conv1d.bias
    out = mixer.out_proj.weight[:, here].to(w), None if mixer.out_proj.bias is None else mixer.out_proj.bias.to(w)
    places = {}
    for source in s.unique().tolist():
        rows, j = (i.to(x.device) for i in (s == source).nonzero(as_tuple=True))
        places[source] = (rows, j)
    return _Parts(
        form, Recurrence(r.dt[..., here], r.u[..., here], r.B, r.C, r.A[here], r.h0), x, conv, gate,
        mixer.conv1d.weight[here, 0].to(w), bias[here].to(w), mixer.D[here].to(w), out, t, s, c, places,
    )  # fmt: skip


def _positions(chosen: Chosen, sizes: list[int], what: str) -> Tensor:
    """(b, m) positions; every row has as many."""
    sel: Selector = selector(slice(None) if chosen is None else chosen, what)
    found = [resolve(sel, size, what) for size in sizes]
    if len({len(row) for row in found}) > 1:
        raise InputError(
            f"{what}={'all' if chosen is None else chosen}: rows of lengths {sizes} have unequal numbers of them. Name "
            f"as many in each, as in {what}=[-2, -1], or take rows of one length together."
        )
    return torch.tensor(found)


def _blocks(parts: _Parts, t: Tensor, budget: int, bar: "tqdm[Any]") -> Iterator[tuple[slice, slice]]:
    """Targets and channels that are worked on together: rows (b, m, n, c) of at most `budget` bytes."""
    b, n, width = len(t), parts.r.A.shape[1], len(parts.channels)
    room = budget // (b * n * parts.dtype.itemsize)
    if room < 1:
        raise InputError(f"budget={budget} bytes: one channel of one target takes {b * n * parts.dtype.itemsize}.")
    m = min(t.shape[1], TOGETHER, room)
    c = min(width, room // m)
    for first in range(0, t.shape[1], m):
        for channel in range(0, width, c):
            rows, columns = slice(first, min(first + m, t.shape[1])), slice(channel, min(channel + c, width))
            yield rows, columns
            bar.update((rows.stop - first) * (columns.stop - channel))


def _weights(parts: _Parts, t: Tensor, c: slice, constant: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The weights (b, m, c) of one source after the other, from the last target backward.

    Args:
        t: (b, m) targets, on the CPU. constant: (b, m, c), to which what no source carries is added.
    """
    r, (b, m) = parts.r, t.shape
    A = r.A[c].T.contiguous()  # (n, c)
    rows = torch.arange(b, device=A.device)[:, None]
    gate = parts.gate[rows, t.to(A.device), c]  # (b, m, c)
    row = A.new_zeros(b, m, *A.shape)  # C_t prod decay, (b, m, n, c), 0 before the target is reached
    taps, k = parts.taps[c], parts.taps.shape[1]
    window: list[Tensor] = []  # the conv outputs that source q enters: s = q, ..., q + k - 1
    last = int(t.max())
    for s in range(last, -1, -1):
        if s < last:
            row *= torch.exp(r.dt[:, s + 1, None, c] * A)[:, None]  # (b, 1, n, c)
        own = t == s
        i, j = (index.to(A.device) for index in own.nonzero(as_tuple=True))
        row[i, j] = r.C[i, s, :, None].expand(-1, -1, A.shape[1])
        found = torch.matmul(r.B[:, s, None, None], row)[:, :, 0] * r.dt[:, s, None, c]  # (b, m, c)  M_ts
        if parts.form == "scan":
            yield s, found
            continue
        found[i, j] += parts.D[c]
        found *= gate * torch.sigmoid(parts.conv[:, s, None, c])
        constant += found * parts.bias[c]
        window = [found, *window[: k - 1]]
        total = window[0] * taps[:, k - 1]
        for back, later in enumerate(window[1:], 2):
            total.addcmul_(later, taps[:, k - back])
        yield s, total


def _arriving(parts: _Parts, t: Tensor, budget: int, bar: "tqdm[Any]") -> tuple[Tensor, Tensor]:
    """What arrives in mixer_out: (b, m, s, d) of each source, and (b, m, d) of none. t: (b, m)."""
    weight, bias = parts.out
    values = weight.new_zeros(*t.shape, parts.s.shape[1], len(weight))
    rest = weight.new_zeros(*t.shape, len(parts.channels))
    where = torch.arange(len(t), device=weight.device)[:, None], t.to(weight.device)
    gate, inputs = (parts.gate[where], parts.r.u) if parts.form == "scan" else (None, parts.x)
    for m, c in _blocks(parts, t, budget, bar):
        for s, found in _weights(parts, t[:, m], c, rest[:, m, c]):
            if s in parts.places:
                rows, j = parts.places[s]
                brought = found[rows] if gate is None else found[rows] * gate[rows, m, c]
                values[rows, m, j] += (brought * inputs[rows, s, None, c]) @ weight[:, c].T
    if gate is not None:
        rest = gate * parts.D * parts.r.u[where]
    return values, F.linear(rest, weight, bias)
