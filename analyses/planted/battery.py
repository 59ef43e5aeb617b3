"""The methods, each as a function of a planted model: what it reports, and what is there."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from interp import (
    Edge,
    EdgeEffects,
    Edit,
    ablate,
    at,
    attention,
    attribution_grid,
    contrast,
    contributions,
    direct_logit,
    edge_attribution,
    edges,
    faithfulness,
    forget,
    freeze,
    gradient_field,
    gradients,
    half_lives,
    knockout_grid,
    logit_lens,
    mean_dt,
    patch_grid,
    path_patch,
    probe,
    prune,
    receptive_field,
    run,
    state_lens,
    steering_curve,
)  # fmt: skip
from interp.circuits.paths import Edges
from interp.sweep import groups

from .models import plant
from .scores import REPORT, Cells, Found, above, compare, coordinates
from .shares import relevant_words, relevant_writes
from .truth import NEGLIGIBLE, Planted

# -- patching and gradients -------------------------------------------------------------------------------------------


def patching(site: str) -> Callable[[Planted], Found]:
    """`patch_grid` over layers and positions."""

    def method(p: Planted) -> Found:
        grid = patch_grid(p.model, p.ids, p.donor_ids, site=site, metric=p.metric, progress=False)
        return compare(p, grid.effect(), p.truth.effects[site])

    return method


def by_channel(p: Planted) -> Found:
    """`patch_grid` of each channel's state at one position: cells (layer, e)."""
    pos = p.ids.shape[1] - 2
    grid = patch_grid(
        p.model, p.ids, p.donor_ids, site="ssm_state", metric=p.metric, positions=[pos], parts=groups(p.model, "e"),
        progress=False,
    )  # fmt: skip
    truth = coordinates(p, {c: v[pos] for c, v in p.truth.coordinates.items()}).sum(2)  # (layers, e, b)
    return compare(p, grid.effect()[:, 0], truth)


def by_gradient(p: Planted) -> Found:
    """Gradient times difference of each coordinate (e, n) of the state at one position."""
    pos = p.ids.shape[1] - 2
    states = at.ssm_state(pos=pos)
    slope = gradients(p.model, p.ids, p.metric, wrt=[states])[states]
    with torch.no_grad():
        base, donor = (run(p.model, ids, record=[states])[states] for ids in (p.ids, p.donor_ids))
    values = (slope * (donor - base)).movedim(1, -1)  # (layers, e, n, b)
    return compare(p, values, coordinates(p, {c: v[pos] for c, v in p.truth.coordinates.items()}))


def attributing(site: str, steps: int = 0) -> Callable[[Planted], Found]:
    """`attribution_grid`, at the base run or along the way from the base's embeddings to the donor's."""

    def method(p: Planted) -> Found:
        grid = attribution_grid(p.model, p.ids, p.donor_ids, site=site, metric=p.metric, steps=steps, progress=False)
        return compare(p, grid.effect(), p.truth.effects[site])

    return method


# -- edges and circuits -----------------------------------------------------------------------------------------------


def edge_cells(found: Iterable[Edges]) -> Cells:
    """Edges as the truth writes them."""
    nodes = [(e.sender, e.receiver) for e in found if isinstance(e, Edge)]
    return {tuple((n.site, n.layer, n.pos) for n in pair) for pair in nodes}


def compare_edges(p: Planted, found: EdgeEffects) -> Found:
    """Effects of edges in the metric's unit against the true ones."""
    gap, none = float(p.gap.abs().max()), torch.zeros(len(p.ids), dtype=torch.float64)
    keys: list[Any] = [next(iter(edge_cells([e]))) for e in found.edges]
    truth = torch.stack([p.truth.edges.get(key, none) for key in keys])
    reported = {key for key, v in zip(keys, found.values, strict=True) if v.abs().max() > REPORT * gap}
    return Found(reported, {*p.truth.edges}, float((found.values - truth).abs().max()) / gap)


@cache
def path_effects(name: str, seed: int) -> EdgeEffects:
    """`path_patch` of every edge of the graph; seconds, so kept."""
    p = plant(name, seed)
    every = edges(p.model.config, p.ids.shape[1])
    return path_patch(p.model, p.ids, p.donor_ids, every, p.metric, progress=False)


def patching_edges(p: Planted) -> Found:
    """`path_patch` of every edge."""
    return compare_edges(p, path_effects(p.name, p.seed))


def attributing_edges(steps: int | None) -> Callable[[Planted], Found]:
    """`edge_attribution` of every edge of the graph."""

    def method(p: Planted) -> Found:
        return compare_edges(p, edge_attribution(p.model, p.ids, p.donor_ids, p.metric, steps=steps))

    return method


def circuits(exact: bool) -> Callable[[Planted], Found]:
    """`prune` of the edges' effects; the error is how far the circuit's `faithfulness` is from 1."""

    def method(p: Planted) -> Found:
        found = path_effects(p.name, p.seed) if exact else edge_attribution(p.model, p.ids, p.donor_ids, p.metric)
        circuit = prune(found, threshold=REPORT * float(p.gap.abs().max()))
        score = faithfulness(p.model, circuit, p.ids, p.donor_ids, p.metric, progress=False).score()
        return Found(edge_cells(circuit.edges), {*p.truth.edges}, abs(float(score) - 1))

    return method


# -- tokens -----------------------------------------------------------------------------------------------------------


def knocking_out(through: str) -> Callable[[Planted], Found]:
    """`knockout_grid` of every source from every target: cells (layer, source, target)."""

    def method(p: Planted) -> Found:
        gap, l = float(p.gap.abs().max()), p.ids.shape[1]
        reported: Cells = set()
        for target in range(1, l):
            grid = knockout_grid(
                p.model, p.ids, p.metric, target=target, sources=range(target), through=through, progress=False
            )
            reported |= {(i, s, target) for i, s in above(grid.effect().abs().amax(-1), REPORT * gap)}
        kinds = {"scan", "conv", "selection"} if through == "all" else {through}
        return Found(reported, {(f.layer, f.source, f.target) for f in p.truth.flows if f.kind in kinds})

    return method


def scan_flows(p: Planted) -> Cells:
    """(layer, source) of what the last token reads from the states."""
    return {(f.layer, f.source) for f in p.truth.flows if f.kind == "scan"}


def fields(p: Planted) -> Found:
    """`receptive_field` of the last token in each layer, all channels together."""
    share = torch.stack(
        [receptive_field(p.model, p.ids, i).share.flip(1).T for i in range(p.model.config.n_layer)]
    )  # (layers, positions, b)
    return Found(above(share.amax(-1), REPORT), scan_flows(p))


def gradient_fields(p: Planted) -> Found:
    """`gradient_field`: which tokens' embeddings the metric leans on."""
    share = gradient_field(p.model, p.ids, p.metric).share.flip(1).amax(0)  # (positions,)
    moves = p.truth.effects["resid_pre"][0].abs().amax(-1)
    return Found(above(share, REPORT), above(moves, NEGLIGIBLE))


def attending(p: Planted) -> Found:
    """`attention` of the block at the last token, as a share of the layer's sizes in d_model: cells (layer, source)."""
    sizes = [
        attention(p.model, p.ids, layer=i, targets=[-1], reduce="norm").weights[:, 0].amax(0)
        for i in range(p.model.config.n_layer)
    ]
    share = torch.stack([size / size.sum() for size in sizes])
    return Found(above(share, REPORT), {(f.layer, f.source) for f in p.truth.flows if f.target == p.ids.shape[1] - 1})


def contributing(p: Planted) -> Found:
    """`contributions` of each source to the last token's `mixer_out`, in the direction of the metric."""
    head = p.model.lm_head.weight.detach()
    direction = head[p.tokens[0]] - head[p.tokens[1]]  # (b, d)
    values = torch.stack(
        [
            torch.einsum("bsd,bd->sb", contributions(p.model, p.ids, layer=i, targets=[-1]).values[:, 0], direction)
            for i in range(p.model.config.n_layer)
        ]
    )  # (layers, s, b)
    truth = torch.zeros_like(values)
    truth[p.truth.layer] = p.truth.contributions.T
    for f in p.truth.flows:
        if f.kind == "conv" and f.target == p.ids.shape[1] - 1:
            truth[f.layer, f.source] = p.truth.feature
    return compare(p, values, truth)


# -- ablations --------------------------------------------------------------------------------------------------------


def ablating(p: Planted) -> Found:
    """`ablate` the state of one channel at all positions: cells (layer, e)."""
    c, b = p.model.config, len(p.ids)
    values = []
    for layer in range(c.n_layer):
        edits = [
            edit for e in range(c.d_inner)
            for edit in ablate(at.ssm_state(layer=layer, e=e), rows=range(b * e, b * (e + 1)))
        ]  # fmt: skip
        values.append(moved(p, edits, c.d_inner))
    truth = -coordinates(p, p.truth.held).sum(2)
    return compare(p, torch.stack(values), truth)


def moved(p: Planted, edits: Sequence[Edit], blocks: int) -> Tensor:
    """(blocks, b) what edits move, each block of rows its own."""
    with torch.no_grad():
        logits = run(p.model, p.ids.repeat(blocks, 1), edits).logits
        return p.metric(logits).unflatten(0, (blocks, len(p.ids))) - p.metric(run(p.model, p.ids).logits)


def stopping(how: str) -> Callable[[Planted], Found]:
    """`freeze` or `forget` one layer at one position: cells (layer, position)."""
    make = {"freeze": freeze, "forget": forget}[how]

    def method(p: Planted) -> Found:
        (b, l), layers = p.ids.shape, p.model.config.n_layer
        values = [
            moved(p, [edit for t in range(l) for edit in make(layer, t, rows=range(b * t, b * (t + 1)))], l)
            for layer in range(layers)
        ]
        truth = torch.zeros(layers, l, b, dtype=torch.float64)
        truth[p.truth.layer] = p.truth.frozen if how == "freeze" else p.truth.forgotten
        return compare(p, torch.stack(values), truth)

    return method


def steering(p: Planted) -> Found:
    """`contrast` of one donor and base after each layer, added at the last position: cells (layer,)."""
    values, ids = [], p.ids[:1]
    for layer in range(p.model.config.n_layer):
        place = at.resid_post(layer=layer, pos=-1)
        with torch.no_grad():
            donor, base = (run(p.model, x, record=[place])[place] for x in (p.donor_ids[:1], ids))
            own = p.metric(run(p.model, ids).logits)
        direction = contrast(place, donor, base)
        curve = steering_curve(p.model, ids, direction, p.metric, [1.0], pos=-1, controls=0, progress=False)
        values.append(curve.values[0] - own)
    truth = torch.zeros(len(values), 1, dtype=torch.float64)
    truth[last_layer(p) :] = p.gap[0]
    return compare(p, torch.stack(values), truth)


# -- what can be read -------------------------------------------------------------------------------------------------


def probing(p: Planted) -> Found:
    """`probe` of what each channel hands to out_proj at the last position: cells (layer, e) above shuffled labels."""
    ids, gated = p.sample(120, p.seed), at.gated(pos=-1)
    with torch.no_grad():
        values = run(p.model, ids, record=[gated])[gated]  # (layers, b, e)
    labels = p.label(ids)
    reported: Cells = set()
    for layer, e in product(range(len(values)), range(values.shape[2])):
        if values[layer, :, e].std() > 0:
            each = range(len(labels))  # a channel takes few values here, and prompts that share one are no copies
            found = probe(values[layer, :, e, None], labels, groups=each, folds=3, seeds=1)
            if found.interval[0] > max(found.chance, *found.controls["shuffled"]):
                reported.add((layer, e))
    return Found(reported, {c for c, role in p.truth.channels.items() if role in ("sum", "value", "second hop")})


# -- lenses -----------------------------------------------------------------------------------------------------------


def last_layer(p: Planted) -> int:
    """The layer that writes the answer."""
    return max(layer for layer, _ in p.truth.channels)


def logit_lenses(p: Planted) -> Found:
    """`logit_lens` at the last position: from which depth on the stream holds the answer."""
    tokens = torch.stack(p.tokens, 1)
    scores = logit_lens(p.model, p.ids, tokens, pos=-1)  # (layers + 1, b, 2)
    truth = torch.zeros(len(scores), len(p.ids), dtype=torch.float64)
    truth[last_layer(p) + 1 :] = p.truth.feature
    return compare(p, scores[..., 0] - scores[..., 1], truth)


def direct_logits(p: Planted) -> Found:
    """`direct_logit`: which layer's state or skip writes the answer; cells (layer, 0 read or 1 skip)."""
    parts = direct_logit(p.model, p.ids, *p.tokens)
    truth = torch.zeros(p.model.config.n_layer, 2, len(p.ids), dtype=torch.float64)
    truth[last_layer(p), 0 if p.truth.state else 1] = p.truth.feature
    return compare(p, torch.stack([parts.read, parts.skip], 1), truth)


def lens_coordinates(p: Planted) -> Found:
    """`state_lens` by channel and state dimension."""
    values = state_lens(p.model, p.ids, *p.tokens, by=("e", "n")).values.movedim(1, -1)
    return compare(p, values, coordinates(p, p.truth.held))


def lens_positions(p: Planted) -> Found:
    """`state_lens` by the position that wrote."""
    values = state_lens(p.model, p.ids, *p.tokens, by="pos").values.movedim(1, -1)  # (layers, l, b)
    truth = torch.zeros_like(values)
    truth[p.truth.layer] = p.truth.contributions.T
    return compare(p, values, truth)


# -- time scales ------------------------------------------------------------------------------------------------------


def lives(measured: bool) -> Callable[[Planted], Found]:
    """`half_lives` of the planted coordinates: reported right (to 1e-6; beyond a million tokens is for ever)."""

    def method(p: Planted) -> Found:
        life = half_lives(p.model, mean_dt(p.model, p.ids) if measured else None)
        there: Cells = {(*c, min(t, 1e6)) for c, t in p.truth.half_life.items()}
        close = {t for t in there if abs(float(life[t[:3]].clamp(max=1e6)) / t[3] - 1) < 1e-6}  # type: ignore[index, operator]
        return Found(close, there)

    return method


# -- what must fail ---------------------------------------------------------------------------------------------------


def largest(difference: bool) -> Callable[[Planted], Found]:
    """No method but a control: as many of the largest |h|, or differences of h, as there are coordinates that count."""

    def method(p: Planted) -> Found:
        states = at.ssm_state(pos=p.ids.shape[1] - 2)
        with torch.no_grad():
            base, donor = (run(p.model, ids, record=[states])[states] for ids in (p.ids, p.donor_ids))
        size = (donor - base if difference else base).abs().amax(1)  # (layers, e, n)
        least = NEGLIGIBLE * float(p.gap.abs().max())
        there: Cells = {c for c, v in p.truth.coordinates.items() if v[-2].abs().max() > least}
        top = size.flatten().topk(max(1, len(there))).indices
        where = torch.stack(torch.unravel_index(top, size.shape), 1)
        return Found({tuple(i) for i in where.tolist()}, there)

    return method


METHODS: dict[str, Callable[[Planted], Found]] = {
    **{f"`patch_grid`, `{s}`": patching(s) for s in ("ssm_state", "state_write", "conv_state", "resid_pre")},
    "`patch_grid`, `ssm_state`, by channel": by_channel,
    **{f"`attribution_grid`, `{s}`": attributing(s) for s in ("ssm_state", "state_write", "conv_state", "resid_pre")},
    "`attribution_grid`, `resid_pre`, 8 steps": attributing("resid_pre", 8),
    "`gradients` x difference, by coordinate": by_gradient,
    "`relevance`, `state_write`": relevant_writes,
    "`relevance`, `embed`": relevant_words,
    "`path_patch`, every edge": patching_edges,
    "`edge_attribution`": attributing_edges(None),
    "`edge_attribution`, 8 steps": attributing_edges(8),
    "`prune` of `path_patch`": circuits(exact=True),
    "`prune` of `edge_attribution`": circuits(exact=False),
    **{f"`knockout_grid`, `{s}`": knocking_out(s) for s in ("scan", "conv", "selection", "all")},
    "`contributions`, of the block": contributing,
    "`attention`, of the block, by size": attending,
    "`ablate`, by channel": ablating,
    "`freeze`": stopping("freeze"),
    "`forget`": stopping("forget"),
    "`probe`, channel by channel": probing,
    "`contrast` and `steering_curve`": steering,
    "`receptive_field`": fields,
    "`gradient_field`": gradient_fields,
    "`logit_lens`": logit_lenses,
    "`direct_logit`": direct_logits,
    "`state_lens`, by coordinate": lens_coordinates,
    "`state_lens`, by position": lens_positions,
    "`half_lives`, of the bias": lives(measured=False),
    "`half_lives`, of the mean dt": lives(measured=True),
    "control: largest state": largest(difference=False),
    "control: largest difference": largest(difference=True),
}
