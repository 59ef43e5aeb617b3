"""One run in which every edge of the graph has a message of its own.

In a plain forward all readers of a site see the same tensor. Here each row is run as several *views*: copies of the row
in the batch, in each of which a site holds what one of its readers is to see. The forward computes every node in the
view that `layout` gives it, from the messages meant for it; the tap takes the node's value from there and sends it on:

    message(sender -> receiver) = (1 - alpha) sender's value in this run + alpha sender's value in another run

alpha is 0 for all edges in the base run, 1 for one edge in path patching, 1 for every edge outside a circuit. Its
gradient at 0 is the edge's attribution. No formula of the model is repeated here: only the residual stream is summed.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from kernels_bridge import resolve
from minimal_mamba import Mamba, Plan
from minimal_mamba.address import address_of
from minimal_mamba.errors import NotReached
from minimal_mamba.sites import SITES
from minimal_mamba.tap import Tap

from ..run import Lengths, run, span
from .graph import Edge, Group, position

READERS = {
    "u": ("state_write", "dt", "B", "C", "skip"),
    "dt": ("state_write", "decay"),
    "B": ("state_write",),
    "C": ("y",),
    "decay": ("ssm_state",),
    "state_write": ("ssm_state",),
    "y": ("mixer_out",),
    "skip": ("mixer_out",),
    "gate": ("mixer_out",),
}
# edges for which the scan must offer its inner sites at a position: at the receiver's, but at the sender's for h -> h
INSIDE = {("dt", "state_write"), ("dt", "decay"), ("decay", "ssm_state"), ("state_write", "ssm_state"),
          ("ssm_state", "y"), ("ssm_state", "ssm_state")}  # fmt: skip

Alphas = Mapping[Group, Tensor]  # (jobs, b or 1, l), by the receiver's position


def layout(groups: Iterable[Group], k: int) -> tuple[dict[str, int], int, int]:
    """The view in which each node is computed, so that no two readers of a site are in one if their messages differ.

    What is not told apart shares a view. The scan's own recurrence is in view 0; ssm_state has a site for each of its
    readers, `state_read`, and `ssm_state` itself for the next token. u_t is in view t mod k where taps differ: there
    the windows of two u do not meet.

    Returns:
        the view of each receiver; how many views u has, k or 1; how many there are in all, 1 to max(5, k).
    """
    kinds = {(sender, receiver) for sender, _, receiver, *_ in groups}
    view = dict.fromkeys(("x", "gate", *READERS["u"], "decay", "ssm_state", "y", "mixer_out"), 0)
    if any(receiver in ("x", "gate") for _, receiver in kinds):
        view["gate"] = 1
    apart = [r for r in READERS["u"] if ("u", r) in kinds and r != "state_write"]
    shared = 1 if ("u", "state_write") in kinds else 0  # of those whose u is nobody's but the run's own
    view |= dict.fromkeys((r for r in READERS["u"] if r != "state_write"), shared)
    view |= {r: 1 + shared + i for i, r in enumerate(apart)}
    if len(apart) == 4:  # nobody shares
        view |= {r: 1 + i for i, r in enumerate(apart)}
    if kinds & {("dt", "decay"), ("dt", "state_write")}:
        view["decay"] = 1
    taps = k if ("x", "u") in kinds else 1
    return view, taps, max(taps, *(v + 1 for v in view.values()))


class Values:
    """What senders sent in another run, at the positions where some edge needs it.

    Args:
        ids: (b, l) of that run. edges: whose senders are kept. mean: keep the mean over the rows that have them.
    Cost: one forward; (b, e, n) for each position of decay, state_write and ssm_state that is a sender.
    """

    def __init__(
        self, model: Mamba, ids: Tensor, edges: Iterable[Edge], lengths: Lengths, backend: str, mean: bool = False
    ):
        needed: dict[tuple[str, int | None], set[int]] = {}
        for edge in edges:
            site, layer, *_ = edge.group
            needed.setdefault((site, layer), set()).add(position(edge.sender))
        self.of: dict[tuple[str, int | None], tuple[dict[int, int], Tensor]] = {}
        places = {}
        for (site, layer), times in needed.items():
            # sites along the sequence whole, so that rows of a padded batch may lack some
            pos: slice | list[int] = slice(0, None)
            if SITES[site].per_position:
                pos = sorted(times)
                if lengths is not None and max(times) >= int(torch.as_tensor(lengths).min()):
                    pos = slice(0, max(times) + 1)
            places[site, layer] = pos, address_of(site, layer, pos=pos)
        done = run(model, ids, record=[a for _, a in places.values()], lengths=lengths, backend=backend)
        plan = Plan(model.config, (), done.records, *span(done.ids, done.lengths, None))
        for key, (pos, address) in places.items():
            kept = done.records[address]  # (b, P, ...)
            has = plan.present(address).to(kept.device).reshape(*kept.shape[:2], *[1] * (kept.dim() - 2))
            kept = torch.where(has, kept, 0.0)  # NaN at positions that a padded row lacks
            if mean:
                kept = kept.sum(0, keepdim=True) / has.sum(0, keepdim=True).clamp(min=1)
            first = range(pos.start, pos.start + kept.shape[1]) if isinstance(pos, slice) else pos
            self.of[key] = {t: c for c, t in enumerate(first)}, kept
        self.logits = done.logits if lengths is None else done.last_logits[:, None]  # as a metric is given them

    def whole(self, site: str, layer: int | None) -> Tensor:
        """(b, l, ...) of a site along the sequence."""
        return self.of[site, layer][1]

    def one(self, site: str, layer: int | None, t: int) -> Tensor:
        """(b, ...) at one position."""
        column, kept = self.of[site, layer]
        return kept[:, column[t]]

    def rows(self, some: slice) -> "Values":
        """Those of some rows."""
        found = copy(self)
        found.of = {key: (column, kept[some]) for key, (column, kept) in self.of.items()}
        return found


class Views(Tap):
    """The tap of one run with messages.

    Args:
        jobs, b: how many runs at once, of how many rows. k: width of the conv. n_layer: of the model.
        alphas: of the edges' groups; an edge of no group carries this run's value. places: the receivers' positions
            at which a group's alpha counts. values: what the other run sent.
    """

    def __init__(
        self, jobs: int, b: int, k: int, n_layer: int,
        alphas: Alphas, places: Mapping[Group, Sequence[int]], values: Values,
    ):  # fmt: skip
        self.view, self.taps, count = layout(alphas, k)
        self.shape, self.k, self.n_layer = (count, jobs, b), k, n_layer
        self.alphas, self.places, self.values = alphas, {g: set(p) for g, p in places.items()}, values
        self.done: set[tuple[Group, int]] = set()
        self.sent: dict[tuple[str, int | None], Tensor] = {}  # embed and mixer_out so far, (jobs, b, l, d)

    def at_layer(self, layer: int) -> "Tap":
        return _Layer(self, layer)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "embed":
            self.sent["embed", None] = value.unflatten(0, self.shape)[0]
        return value

    def blend(self, own: Tensor, group: Group, t: int | None = None) -> Tensor:
        """The message of an edge group, at all positions of the sender or at the receiver's position t."""
        if group not in self.alphas or (t is not None and t not in self.places[group]):
            return own
        self.done.update((group, p) for p in (self.places[group] if t is None else [t]))
        site, layer, *_, lag = group
        alpha = self.alphas[group].to(own.dtype)
        if t is None:
            weight, other = alpha, self.values.whole(site, layer)
        else:
            weight, other = alpha[..., t], self.values.one(site, layer, t - lag)
        weight = weight.reshape(weight.shape + (1,) * (own.dim() - weight.dim()))
        return torch.lerp(own, other.to(own.dtype).expand_as(own), weight.expand_as(own))

    def residual(self, own: Tensor, site: str, layer: int | None) -> Tensor:
        """(jobs, b, l, d): the residual stream that one of its readers sees."""
        for (sender, below), sent in self.sent.items():
            group = (sender, below, site, layer, 0)
            if group in self.alphas:
                own = own + (self.blend(sent, group) - sent).to(own.dtype)
        return own

    def check(self) -> None:
        """Raise NotReached unless every message was sent."""
        for group, where in self.places.items():
            if left := sorted(t for t in where if (group, t) not in self.done):
                raise NotReached(
                    f"the edges {group[0]} -> {group[2]} of layer {group[3]} were not reached at positions {left}: the "
                    "operations in use passed over them. This is a fault of the backend; run with backend='reference'."
                )


class _Layer(Tap):
    """The views of one layer."""

    def __init__(self, whole: Views, layer: int):
        self.whole, self.layer = whole, layer
        self.resid = self.state = torch.empty(0)

    def touches(self, *sites: str) -> bool:
        return True

    def edited(self, *sites: str) -> list[int]:
        found: set[int] = set()
        for group, where in self.whole.places.items():
            sender, _, receiver, layer, lag = group
            if layer == self.layer and (sender, receiver) in INSIDE and "ssm_state" in sites:
                found.update(t - lag for t in where)
        return sorted(found)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        views = value.unflatten(0, self.whole.shape)  # (views, jobs, b, [l,] ...)
        made = self._pass(site, views, t)
        return value if made is None else made.flatten(0, 2)

    def _pass(self, site: str, views: Tensor, t: int | None) -> Tensor | None:
        """What each view is to hold; None where nothing changes."""
        if site == "resid_pre":
            self.resid = views[0]  # the same in all views
            readers = {self.whole.view[s]: self.whole.residual(self.resid, s, self.layer) for s in ("x", "gate")}
            return self._put(self.resid, readers)
        if site == "x":
            return self._taps(views[self.whole.view["x"]])
        if site == "mixer_out":
            self.whole.sent[site, self.layer] = views[self.whole.view[site]]
            return None
        if site == "resid_post":
            after = self.resid + self.whole.sent["mixer_out", self.layer]
            if self.layer == self.whole.n_layer - 1:
                after = self.whole.residual(after, "logits", None)
            return self._put(after, {})
        if site == "ssm_state":
            assert t is not None
            self.state = views[self.whole.view[site]]
            group = ("ssm_state", self.layer, "ssm_state", self.layer, 1)
            return self._put(self.state, {self.whole.view["ssm_state"]: self.whole.blend(self.state, group, t + 1)})
        if site == "state_read":
            group = ("ssm_state", self.layer, "y", self.layer, 0)
            return self._put(self.state, {self.whole.view["y"]: self.whole.blend(self.state, group, t)})
        if site not in READERS:
            return None
        own = self._windows(views) if site == "u" else views[self.whole.view[site]]
        groups = {reader: (site, self.layer, reader, self.layer, 0) for reader in READERS[site]}
        return self._put(own, {self.whole.view[r]: self.whole.blend(own, group, t) for r, group in groups.items()})

    def _put(self, own: Tensor, held: Mapping[int, Tensor]) -> Tensor:
        """All views: what each is to hold, and the node's own value in the others."""
        count = self.whole.shape[0]
        return torch.stack([held.get(v, own) for v in range(count)]) if count > 1 else held.get(0, own)[None]

    def _taps(self, x: Tensor) -> Tensor:
        """x (jobs, b, l, e) as each view's u see it: the tap of lag j joins x_s to u_{s+j}, in view s+j mod k."""
        k, l = self.whole.k, x.shape[2]
        held = dict.fromkeys(range(self.whole.taps), x)
        s = torch.arange(l, device=x.device)
        for lag in range(k):
            group = ("x", self.layer, "u", self.layer, lag)
            if group not in self.whole.alphas:
                continue
            # the receiver's alpha, moved to the sender's position; beyond the end there is none
            shifted = torch.nn.functional.pad(self.whole.alphas[group][..., lag:], (0, min(lag, l)))
            self.whole.done.update((group, p) for p in self.whole.places[group])
            other = self.whole.values.whole("x", self.layer).to(x.dtype).expand_as(x)
            for v in held:
                weight = (shifted * ((s + lag) % k == v)).to(x.dtype)[..., None]
                held[v] = torch.lerp(held[v], other, weight.expand_as(x))
        return self._put(x, held)

    def _windows(self, views: Tensor) -> Tensor:
        """u (jobs, b, l, e), each position from its own view."""
        if self.whole.taps == 1:
            return views[0]
        t = torch.arange(views.shape[3], device=views.device)
        return views[t % self.whole.k, :, :, t].permute(1, 2, 0, 3)


def send(
    model: Mamba, ids: Tensor, values: Values, alphas: Alphas, places: Mapping[Group, Sequence[int]],
    lengths: Lengths, backend: str,
) -> Tensor:  # fmt: skip
    """Run with messages.

    Args:
        ids: (b, l). values: of the other run. alphas: (jobs, b or 1, l) a group. places: the positions that count.
    Returns:
        logits (jobs, b, l, v), or with `lengths` of each row's last token (jobs, b, 1, v).
    Raises:
        NotReached: the backend passed over a site.
    Cost: one forward of 1 to max(5, k) views of jobs b rows; a readable step of the scan at the
        positions of edges inside it.
    """
    jobs = next((len(a) for a in alphas.values()), 1)
    tap = Views(jobs, len(ids), model.config.d_conv, model.config.n_layer, alphas, places, values)
    many = tap.shape[0] * jobs
    copies, sizes = model.check(ids.repeat(many, 1), None if lengths is None else torch.as_tensor(lengths).repeat(many))
    out = model.score(copies, sizes, None, False, lengths is not None, tap, resolve(backend, model.device))
    tap.check()
    return out.logits.unflatten(0, tap.shape)[0]
