"""What a planted model does, in closed form: which cells, tokens, channels and time scales carry its answer.

A circuit in the state is a sum over a few coordinates (e, n) of one layer,

    answer = sum_c sum_s C_T[c] (prod_{s < t <= T} keep_t[c]) step_s[c] B_s[c] u_s[c]

with all of these looked up in a table by the token and the one before it. A delay line is two hops of the
convolution. Everything here follows from the tokens by these formulas; nothing runs the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from interp.run import Metric
from minimal_mamba import Mamba

Node = tuple[str, int | None, int]  # site, layer, position
SITES = ("resid_pre", "x", "conv_state", "u", "state_write", "ssm_state", "state_read", "y", "mixer_out")
NEGLIGIBLE = 1e-6  # of the gap between donor and base; a test sees that no effect lies between this and NOTABLE
NOTABLE = 0.01


class Terms(NamedTuple):
    """What the tokens mean to each coordinate c of the state, each (b, l, c).

    keep = exp(dt A); step = dt; step B u is written; C, in the unit of the metric, reads.
    """

    keep: Tensor
    step: Tensor
    B: Tensor
    u: Tensor
    C: Tensor

    @property
    def write(self) -> Tensor:
        """What is written."""
        return self.step * self.B * self.u

    def at(self, p: int, other: "Terms", *names: str) -> "Terms":
        """These terms, with those of the other prompts at position p."""
        here = torch.arange(self.keep.shape[1])[:, None] == p
        return self._replace(**{name: torch.where(here, getattr(other, name), getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Flow:
    """The answer needs what `target` takes from `source` in this layer, by the "scan", the "conv" or the "selection".

    By the selection: B or dt of a token whose write `target` reads has come from `source`, which may be that token.
    Of tokens before the target; what it takes from itself is no flow.
    """

    layer: int
    source: int
    target: int
    kind: str


@dataclass(frozen=True, eq=False)
class Truth:
    """All that is known of a planted model.

    Args:
        layer: where the state carries the quantity; of a delay line, where its first hop is.
        effects: by site, (layers, l, b): what putting the donor's value into the base run there moves, exactly.
        coordinates: {(layer, e, n): (l, b)} what it moves to put the donor's h at one state coordinate, by position;
            all other coordinates move nothing.
        state: {(layer, e, n): (b, l)} the value of h itself in the base run.
        edges: {(sender, receiver): (b,)} what it moves where one edge of the graph alone carries the donor's value, of
            all edges that move anything; nodes as (site, layer, position).
        flows: from token to token, in the base run; a flow that is not here carries nothing.
        contributions: (b, l) what each token wrote that is read at the end, in the metric; all zero of a delay line.
        frozen, forgotten: (l, b) what it moves where no time passes at one position (h_t = h_{t-1}), and where all that
            was held before it is lost (h_t = write_t), in this layer.
        held: {(layer, e, n): (b,)} what each coordinate of the state adds to the metric at the end.
        half_life: {(layer, e, n): tokens} until a kept value is halved.
        channels: {(layer, e): role} of all channels of the circuit. All others are distractors.
        feature: (b,) the quantity that the answer is linear in, at the last position.
    """

    layer: int
    effects: dict[str, Tensor]
    coordinates: dict[tuple[int, int, int], Tensor]
    state: dict[tuple[int, int, int], Tensor]
    edges: dict[tuple[Node, Node], Tensor]
    flows: frozenset[Flow]
    contributions: Tensor
    frozen: Tensor
    forgotten: Tensor
    held: dict[tuple[int, int, int], Tensor]
    half_life: dict[tuple[int, int, int], float]
    channels: dict[tuple[int, int], str]
    feature: Tensor


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with a circuit of known form, prompts that use it, and the truth about it.

    Args:
        ids, donor_ids: (b, l); they differ where it matters and where it does not. metric: (b, l, v) -> (b,).
        tokens: (b,) answer and (b,) foil; the metric is the difference of their logits.
        answer: (ids) -> (b,), the metric in closed form, for any prompts of the kind that `sample` draws.
        sample: (n, seed) -> (n, l) more prompts. label: (ids) -> (b,) what is computed: a number, or a token.
    """

    name: str
    seed: int
    model: Mamba
    ids: Tensor
    donor_ids: Tensor
    metric: Metric
    tokens: tuple[Tensor, Tensor]
    answer: Callable[[Tensor], Tensor]
    sample: Callable[[int, int], Tensor]
    label: Callable[[Tensor], Tensor]
    truth: Truth

    @property
    def gap(self) -> Tensor:
        """(b,) the donor's metric less the base's."""
        return self.answer(self.donor_ids) - self.answer(self.ids)


def previous(ids: Tensor) -> Tensor:
    """The token before each; -1 before the first."""
    return torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], 1)


def scan(keep: Tensor, write: Tensor) -> Tensor:
    """h_t = keep_t h_{t-1} + write_t, (b, l, c)."""
    h, out = torch.zeros_like(write[:, 0]), []
    for t in range(write.shape[1]):
        h = keep[:, t] * h + write[:, t]
        out.append(h)
    return torch.stack(out, 1)


def read_out(terms: Terms) -> Tensor:
    """(b,) the answer."""
    return (scan(terms.keep, terms.write)[:, -1] * terms.C[:, -1]).sum(-1)


# the edges inside a layer by which a coordinate's terms come and go: sender, receiver, what the donor's value changes
EDGES = (
    ("u", "dt", ("keep", "step")), ("u", "B", ("B",)), ("u", "C", ("C",)), ("dt", "decay", ("keep",)),
    ("u", "state_write", ("u",)), ("dt", "state_write", ("step",)), ("B", "state_write", ("B",)), ("C", "y", ("C",)),
    ("decay", "ssm_state", ("keep",)), ("state_write", "ssm_state", ("step", "B", "u")),
)  # fmt: skip


def _node(site: str, layer: int, p: int) -> Node:
    return site, None if site in ("embed", "logits") else layer, p


def state_truth(
    ids: Tensor,
    donor_ids: Tensor,
    terms: Callable[[Tensor, Tensor], Terms],
    *,
    layer: int,
    n_layer: int,
    coordinates: list[tuple[int, int]],
    half_life: float,
    channels: dict[tuple[int, int], str],
    binding: bool = False,
) -> Truth:
    """The truth of a circuit in the state.

    Args:
        terms: (tokens, tokens before) -> Terms.
        coordinates: (e, n) of each c. binding: whether what a token writes depends on the token before it.
    """
    b, l = ids.shape
    prev, donor_prev = previous(ids), previous(donor_ids)
    own, other = terms(ids, prev), terms(donor_ids, donor_prev)
    base, donor = read_out(own), read_out(other)
    keep, write = own.keep, own.write
    h, donor_h = scan(keep, write), scan(other.keep, other.write)
    later = torch.stack([keep[:, p + 1 :].prod(1) for p in range(l)], 1)  # (b, l, c) from h_p to h_T
    share = own.C[:, -1:] * later  # (b, l, c)

    def swap(p: int, *, token: bool, before: bool, after: bool) -> Tensor:
        """The answer's change where token p, the one before it or the one before its successor are the donor's."""
        cur, past = ids.clone(), prev.clone()
        if token:
            cur[:, p] = donor_ids[:, p]
        if before:
            past[:, p] = donor_prev[:, p]
        if after and p + 1 < l:
            past[:, p + 1] = donor_ids[:, p]
        return read_out(terms(cur, past)) - base

    nothing = torch.zeros(n_layer, l, b, dtype=torch.float64)
    effects = {site: nothing.clone() for site in SITES}
    for p in range(l):
        effects["resid_pre"][: layer + 1, p] = swap(p, token=True, before=False, after=True)
        effects["x"][layer, p] = swap(p, token=True, before=False, after=True)
        effects["conv_state"][layer, p] = swap(p, token=False, before=False, after=True)
        effects["u"][layer, p] = swap(p, token=True, before=True, after=False)
        effects["state_write"][layer, p] = ((other.write - write) * share)[:, p].sum(-1)
        effects["ssm_state"][layer, p] = ((donor_h - h) * share)[:, p].sum(-1)
    effects["resid_pre"][layer + 1 :, -1] = donor - base
    effects["state_read"][layer, -1] = effects["ssm_state"][layer, -1]
    effects["y"][layer, -1] = effects["mixer_out"][layer, -1] = donor - base

    def edge(p: int, *names: str) -> Tensor:
        return read_out(own.at(p, other, *names)) - base

    moves: dict[tuple[Node, Node], Tensor] = {}
    end = l - 1

    def put(sender: str, p: int, receiver: str, q: int, moved: Tensor) -> None:
        moves[_node(sender, layer, p), _node(receiver, layer, q)] = moved

    for p in range(l):
        put("embed", p, "x", p, effects["x"][layer, p])
        put("x", p, "u", p, swap(p, token=True, before=False, after=False))
        if p < end:
            put("x", p, "u", p + 1, effects["conv_state"][layer, p])
            put("ssm_state", p, "ssm_state", p + 1, effects["ssm_state"][layer, p])
        for sender, receiver, names in EDGES:
            put(sender, p, receiver, p, edge(p, *names))
    put("ssm_state", end, "y", end, effects["ssm_state"][layer, end])
    for sender, receiver in (("y", "mixer_out"), ("mixer_out", "logits")):
        put(sender, end, receiver, end, donor - base)

    contributions = (write * share).sum(-1)  # (b, l)
    least = NEGLIGIBLE * float((donor - base).abs().max())
    carried = (write * share).abs().amax((0, 2)) > least
    flows = {Flow(layer, s, l - 1, "scan") for s in range(l) if carried[s]}
    flows |= {Flow(layer, s - binding, l - 1, "selection") for s in range(l) if carried[s]}
    still = own._replace(keep=torch.ones_like(keep), step=torch.zeros_like(keep))
    lost = own._replace(keep=torch.zeros_like(keep))
    moves = {way: moved for way, moved in moves.items() if bool((moved.abs() > least).any())}
    moved = (donor_h - h) * share
    where = [(layer, e, n) for e, n in coordinates]
    return Truth(
        layer,
        effects,
        {c: moved[:, :, i].T for i, c in enumerate(where)},
        {c: h[:, :, i] for i, c in enumerate(where)},
        moves,
        frozenset(flows),
        contributions,
        torch.stack([read_out(own.at(p, still, "keep", "step")) - base for p in range(l)]),
        torch.stack([read_out(own.at(p, lost, "keep")) - base for p in range(l)]),
        {c: (h * share)[:, -1, i] for i, c in enumerate(where)},
        dict.fromkeys(where, half_life),
        channels,
        base,
    )


def delay_truth(
    ids: Tensor,
    donor_ids: Tensor,
    hops: list[tuple[int, int]],
    answer: Callable[[Tensor], Tensor],
    n_layer: int,
    channels: dict[tuple[int, int], str],
) -> Truth:
    """The truth of a delay line of two hops (layer, tokens): the conv, and nothing in the state."""
    b, l = ids.shape
    (first, d1), (second, d2) = hops
    end, middle, source = l - 1, l - 1 - d2, l - 1 - d2 - d1
    gap = answer(donor_ids) - answer(ids)
    effects = {site: torch.zeros(n_layer, l, b, dtype=torch.float64) for site in SITES}
    for site, cells in {
        "x": [(first, source), (second, middle)],
        "u": [(first, middle), (second, end)],
        "mixer_out": [(first, middle), (second, end)],
        "conv_state": [(first, p) for p in range(source, middle)] + [(second, p) for p in range(middle, end)],
    }.items():
        for layer, p in cells:
            effects[site][layer, p] = gap
    for layer in range(n_layer):
        at = source if layer <= first else middle if layer <= second else end
        effects["resid_pre"][layer, at] = gap
    flows = {Flow(first, source, middle, "conv"), Flow(second, middle, end, "conv")}
    nothing = torch.zeros(b, l, dtype=torch.float64)
    moves: dict[tuple[Node, Node], Tensor] = {}
    before: Node = ("embed", None, source)
    for layer, p, q in ((first, source, middle), (second, middle, end)):
        way = [before, *(_node(*node) for node in (("x", layer, p), ("u", layer, q), ("skip", layer, q)))]
        before = ("mixer_out", layer, q)
        moves |= dict.fromkeys(pairwise([*way, before]), gap)
    moves[before, ("logits", None, end)] = gap
    return Truth(
        first, effects, {}, {}, moves, frozenset(flows), nothing, nothing.T, nothing.T, {}, {}, channels, answer(ids)
    )
