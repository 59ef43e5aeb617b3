"""Path patching and edge attribution: what reaches a metric through one edge of the graph.

`path_patch` is exact and costs runs for each edge; `edge_attribution` is its first order, for all edges at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.block import wide
from minimal_mamba.errors import AddressError, EditError, InputError

from ..run import Lengths, Metric, apply_metric, donor_of, gradient, known
from ..sweep.engine import rows_at_once
from .graph import Edge, Group, position
from .graph import edges as all_edges
from .views import INSIDE, Values, layout, send

MEMORY = 1 << 30  # bytes that the backward of edge_attribution may hold: so many rows at a time, one at least
Edges = Edge | tuple[Edge, ...]  # one edge, or some that are patched at once


@dataclass(frozen=True, eq=False)
class EdgeEffects:
    """What each edge does, in the unit of the metric.

    Args:
        edges: one edge, or some patched at once, for each row of values.
        values: (edges, b) how the metric moves where the edge alone carries the donor's value.
        base, donor: (b,) the metric of the two runs.
        config, length: the model and the number of tokens, which say what other edges there are.
    """

    edges: tuple[Edges, ...]
    values: Tensor
    base: Tensor
    donor: Tensor
    config: MambaConfig
    length: int

    def mean(self) -> Tensor:
        """(edges,): the mean over the batch."""
        return self.values.mean(-1)

    def size(self) -> Tensor:
        """(edges,): the mean over the batch of |effect|, so that rows of opposite signs do not cancel."""
        return self.values.abs().mean(-1)

    def towards(self) -> Tensor:
        """(edges,): the mean over the batch of effect * sign(donor - base): positive moves a row to its donor."""
        return (self.values * (self.donor - self.base).sign()).mean(-1)

    def top(self, n: int = 10) -> list[tuple[Edges, float]]:
        """The n edges of the largest size, and how far each moves the metric towards the donor."""
        towards, ranked = self.towards(), self.size().argsort(descending=True, stable=True)
        return [(self.edges[i], float(towards[i])) for i in ranked[:n].tolist()]

    def __str__(self) -> str:
        lines = [f"  {effect:+.3g}  {edge}" for edge, effect in self.top()]
        return "\n".join([f"EdgeEffects of {len(self.edges)} edges on {len(self.base)} rows; the largest:", *lines])

    __repr__ = __str__

    def __getitem__(self, edge: Edges) -> Tensor:
        """(b,): what one edge does."""
        if edge not in self.edges:
            raise InputError(f"{edge} is none of the {len(self.edges)} edges here; name it in edges=.")
        return self.values[self.edges.index(edge)]


@torch.no_grad()
def path_patch(
    model: Mamba,
    ids: Tensor,
    donor_ids: Tensor,
    edges: Iterable[Edge | Sequence[Edge]],
    metric: Metric,
    *,
    lengths: Lengths = None,
    backend: str = "auto",
    batch: int | None = None,
    progress: bool = True,
) -> EdgeEffects:
    """Let one edge carry the donor run's value, and nothing else; see what the metric does.

        effect(s -> r) = metric(run in which r is computed from the donor's s, all its other inputs the base's) - metric

    Everything downstream of the receiver follows it; no other reader of the sender sees the donor's value. It is the
    difference of two runs that can be made by hand: Set s to the donor's value and every other input of r to the
    base's, and record r; Set r to that in the base run.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row.
        edges: edges, as `edges(...)` lists them or made with `Edge`; of some in a tuple all carry the donor's values.
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        lengths: (b,) tokens in each row, the same in base and donor.
        batch: rows at a time; None: 320, or of long prompts as many as hold 8,192 tokens.
    Returns:
        EdgeEffects.
    Raises:
        AddressError: an edge of a layer or position that the run has not. InputError: prompts that do not match.
    Cost: one to k rows of a forward for each edge and row of the batch, and a readable step of the scan where the edge
        is inside it. The donor's values at the senders are kept.
    Source: Wang et al. 2022 (arXiv:2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv:2304.05969). Differs: an
        edge is one direct edge of the graph; a path of several through the same tokens is a tuple of its own.
    """
    named: list[Edges] = [tuple(e) if isinstance(e, Sequence) else e for e in edges]
    ids, donor_ids, single = check(model, ids, donor_ids, lengths, [e for one in named for e in _several(one)])
    room = rows_at_once(batch, 320, ids.shape[1])
    values = Values(model, donor_ids, set(single), lengths, backend)
    base = apply_metric(metric, send(model, ids, values, {}, {}, lengths, backend)[0])
    found: dict[int, Tensor] = {}
    with tqdm(total=len(named), desc="path patch", disable=not progress) as bar:
        for part in _alike(named, room // len(ids), model.config.d_conv):
            jobs = [_several(named[i]) for i in part]
            found |= zip(part, patched(model, ids, values, jobs, metric, lengths, backend), strict=True)
            bar.update(len(part))
    effects = torch.stack([found[i] for i in range(len(named))]) - base if named else base.new_zeros(0, len(base))
    donor = _donor(metric, values)
    return EdgeEffects(tuple(named), effects, base, donor, model.config, ids.shape[1])


def _alike(named: Sequence[Edges], room: int, k: int) -> Iterable[list[int]]:
    """Indices of edges to be run together: those that need the same views, in as many copies as there is room for."""
    kinds: dict[frozenset[tuple[str, str]], list[int]] = {}
    for i, one in enumerate(named):
        kinds.setdefault(frozenset((e.sender.site, e.receiver.site) for e in _several(one)), []).append(i)
    for members in kinds.values():
        *_, views = layout({e.group for e in _several(named[members[0]])}, k)
        jobs = max(1, room // views)
        yield from (members[first : first + jobs] for first in range(0, len(members), jobs))


def patched(
    model: Mamba, ids: Tensor, values: Values, jobs: Sequence[Iterable[Edge]], metric: Metric,
    lengths: Lengths, backend: str,
) -> list[Tensor]:  # fmt: skip
    """(b,) for each job: the metric where the edges of the job carry the other run's values."""
    alphas: dict[Group, Tensor] = {}
    places: dict[Group, set[int]] = {}
    for j, job in enumerate(jobs):
        for edge in job:
            group, pos = edge.group, position(edge.receiver)
            if group not in alphas:
                alphas[group], places[group] = torch.zeros(len(jobs), 1, ids.shape[1]), set()
            alphas[group][j, 0, pos] = 1.0
            places[group].add(pos)
    there = {group: alpha.to(model.device) for group, alpha in alphas.items()}
    fixed = {group: sorted(where) for group, where in places.items()}
    logits = send(model, ids, values, there, fixed, lengths, backend)  # (jobs, b, l, v); one where no edge is named
    return [apply_metric(metric, logits[min(j, len(logits) - 1)]) for j in range(len(jobs))]


def edge_attribution(
    model: Mamba,
    ids: Tensor,
    donor_ids: Tensor,
    metric: Metric,
    edges: Iterable[Edge] | None = None,
    *,
    steps: int | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
) -> EdgeEffects:
    """The first-order effect of every edge, from one forward of base, one of donor and one backward.

        score(s -> r) = (s_donor - s_base) . dMetric/d(s as r alone sees it)

    It is the derivative of path patching along the way from the base's to the donor's message, taken at the base.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row.
        metric: differentiable, logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        edges: all of the graph if None.
        steps: average the gradient at so many points (midpoints) of the straight way on which all edges go together
            from base to donor (integrated gradients): with all edges of the graph, scores then sum to donor - base, up
            to O(steps^-2). None: at the base alone.
        lengths: (b,) tokens in each row, the same in base and donor.
    Returns:
        EdgeEffects, per row of the batch.
    Raises:
        AddressError, InputError as `path_patch`; MetricError for a metric without a gradient.
    Cost: a forward and a backward of max(5, k) b rows, for all edges of 24 layers as much as 50 plain forwards; with
        `steps` one more forward of these rows for each. A readable step of the scan at each position of edges inside
        it holds some 12 (e, n) for each view and row: with all edges some 6 MB a row, layer and token of mamba-130m.
        Rows go as many at a time as hold 1 GiB of it, one at least; for long sequences name `edges` at the positions
        that matter. The donor's decay, write and state are kept there.
    Source: Syed, Rager and Conmy 2023 (arXiv:2310.10348), equation 5; with `steps` Hanna, Pezzelle and Belinkov 2024
        (arXiv:2403.17806). Differs: nodes inside the layer, and positions.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise InputError(f"steps={steps!r}: an int of at least 1, or None.")
    with torch.inference_mode(False), torch.no_grad():  # what is made here is to be differentiated through
        ids, donor_ids, named = check(model, ids, donor_ids, lengths, edges)
        values = Values(model, donor_ids, named, lengths, backend)
        at_base = send(model, ids, values, {}, {}, lengths, backend)[0]
        base = apply_metric(metric, at_base)
    places: dict[Group, set[int]] = {}
    for edge in named:
        places.setdefault(edge.group, set()).add(position(edge.receiver))
    fixed = {group: sorted(where) for group, where in places.items()}
    with torch.inference_mode(False):  # as what is added to it
        total = {group: torch.zeros(ids.shape, dtype=base.dtype, device=base.device) for group in fixed}
    points = [0.0] if steps is None else [(i + 0.5) / steps for i in range(steps)]
    step = _rows_at_once(model, fixed, ids.shape[1])
    for point in points:
        with torch.inference_mode(False), torch.no_grad():
            # an alpha for each row, so that each row's gradient is that of its own metric
            alphas = {g: torch.zeros((1, *ids.shape), dtype=base.dtype, device=ids.device) for g in fixed}
            for group, where in fixed.items():
                alphas[group][..., where] = point
            logits = send(model, ids, values, alphas, fixed, lengths, backend)[0] if point else at_base
        with torch.inference_mode(False), torch.enable_grad():
            # the metric is given all rows, and its gradient goes on through some at a time
            leaf = logits.requires_grad_()
            (pull,) = gradient(apply_metric(metric, leaf.clone()), [leaf])
            for first in range(0, len(ids) if fixed else 0, step):
                some = slice(first, first + step)
                mine = {group: alpha[:, some].requires_grad_() for group, alpha in alphas.items()}
                sizes = None if lengths is None else torch.as_tensor(lengths)[some]
                made = send(model, ids[some], values.rows(some), mine, fixed, sizes, backend)[0]
                found = torch.autograd.grad(made, list(mine.values()), pull[some], materialize_grads=True)
                for group, slope in zip(mine, found, strict=True):
                    total[group][some] += slope[0] / len(points)
    found_at = [total[e.group][:, position(e.receiver)] for e in named]
    effects = torch.stack(found_at) if named else base.new_zeros(0, len(base))
    donor = _donor(metric, values)
    return EdgeEffects(tuple(named), effects, base, donor, model.config, ids.shape[1])


def _rows_at_once(model: Mamba, places: Mapping[Group, Sequence[int]], l: int) -> int:
    """How many rows the backward holds in MEMORY bytes."""
    c, (*_, views) = model.config, layout(places, model.config.d_conv)
    steps = {(i, t - lag) for (s, _, r, i, lag), where in places.items() if (s, r) in INSIDE for t in where}
    numbers = c.d_inner * (12 * c.d_state * len(steps) + 14 * c.n_layer * l) + c.padded_vocab * l
    return max(1, MEMORY // (views * numbers * wide(model.dtype).itemsize))


def check(
    model: Mamba, ids: Tensor, donor_ids: Tensor, lengths: Lengths, edges: Iterable[Edge] | None
) -> tuple[Tensor, Tensor, list[Edge]]:
    """The two prompts, without what is padding in every row, and the edges, all there are if None, once all fit."""
    known(model)
    ids, sizes = model.check(ids, lengths)
    donor_ids = donor_of(model, ids, donor_ids)
    layers, l = model.config.n_layer, int(sizes.max())
    named = list(all_edges(model.config, l) if edges is None else edges)
    for edge in named:
        if not isinstance(edge, Edge):
            raise EditError(f"{edge!r} is no edge; make one with Edge(sender, receiver), or list them with edges(...).")
        high = max((n.layer for n in (edge.sender, edge.receiver) if isinstance(n.layer, int)), default=0)
        tap = edge.lag if edge.sender.site == "x" else 0
        if high >= layers or position(edge.receiver) >= l or tap >= model.config.d_conv:
            raise AddressError(
                f"{edge} does not exist here: there are layers 0..{layers - 1}, positions 0..{l - 1}, "
                f"and a conv of {model.config.d_conv} taps."
            )
    return ids[:, :l], donor_ids[:, :l], named


def _several(edges: Edges) -> tuple[Edge, ...]:
    return edges if isinstance(edges, tuple) else (edges,)


@torch.no_grad()
def _donor(metric: Metric, values: Values) -> Tensor:
    """The metric of the other run."""
    return apply_metric(metric, values.logits)
