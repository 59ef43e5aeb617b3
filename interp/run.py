"""`run`, `generate` and `gradients`: one call, from token ids and edits to numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TypeVar, cast

import torch
from torch import Tensor

from kernels_bridge import resolve
from minimal_mamba import Address, Edit, Mamba, MambaState, Plan
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.edits import edit_or_address
from minimal_mamba.errors import EditError, InputError, MetricError, NotRecorded
from minimal_mamba.item import Probe
from minimal_mamba.tap import NO_TAP, Toward

from .logits import countable, written

Metric = Callable[[Tensor], Tensor]  # logits (b, l, v) -> (b,)
Lengths = Tensor | Sequence[int] | None
T = TypeVar("T", Edit, Address)


@dataclass(frozen=True, eq=False, repr=False)
class Run(Brief):
    """What a run gave.

    Args:
        ids: (b, l) the tokens; of `generate`, with what was generated.
        logits: (b, l, v), zero on padding; (b, 1, v) with `last_only`.
        lengths: (b,) tokens in each row of `ids`.
        kept: the memory after each row's last token, if it was to be kept; read it as `state`.
        backend: the name of the operations that ran.
        vocab_size: how many of the v columns of `logits` are tokens; the others are padding of the embedding.
    `run_[address]` is a copy of what was recorded there.
    """

    ids: Tensor
    logits: Tensor
    lengths: Tensor
    kept: MambaState | None = field(repr=False)
    backend: str
    vocab_size: int
    records: Mapping[Address, Tensor] = field(repr=False)

    def __getitem__(self, address: Address) -> Tensor:
        if address not in self.records:
            made = ", ".join(map(str, self.records)) or "nothing"
            raise NotRecorded(
                f"{address} was not recorded; this run recorded {made}. Name it in run(..., record=[...])."
            )
        return self.records[address].clone()

    @property
    def state(self) -> MambaState:
        """The memory after each row's last token; raises NotRecorded where it was not kept: None would start afresh."""
        if self.kept is None:
            raise NotRecorded("the memory after this run was not kept; ask for it with run(..., keep_state=True).")
        return self.kept

    @property
    def last_logits(self) -> Tensor:
        """(b, v): the logits of each row's last token; of `generate`, those that chose it."""
        if self.logits.shape[1] == 1:
            return self.logits[:, 0]
        beyond = self.ids.shape[1] - self.logits.shape[1]  # `generate` does not run its last token
        if beyond > 1:
            return self.logits[:, -1]  # of `generate(..., last_only=True)`: one a new token
        rows = torch.arange(len(self.logits), device=self.logits.device)
        return self.logits[rows, (self.lengths - 1 - beyond).to(self.logits.device)]


def run(
    model: Mamba,
    ids: Tensor,
    edits: Edit | Iterable[Edit] = (),
    record: Address | Iterable[Address] = (),
    backend: str = "auto",
    state: MambaState | None = None,
    keep_state: bool = False,
    lengths: Lengths = None,
    last_only: bool = False,
) -> Run:
    """Run a model once under edits and record what was asked.

    Args:
        ids: (b, l) token ids.
        edits: one, or several, applied in the order given wherever they name the same place.
        record: an address, or several, to keep; values are those after edits. On a padded batch the cells of a slice
            that a row lacks are NaN. A slice that starts with a negative number has a column for each offset from the
            rows' own ends; any other is aligned from its start.
        backend: "reference", "torch", "compiled", "fused", or "auto", the fastest available here; `Run.backend` says
            which.
        state: a memory to go on from; positions then count on from where it stood.
        keep_state: keep the memory after the last token.
        lengths: (b,) real tokens in each row of a right-padded batch; negative positions count from a row's own end.
        last_only: logits of each row's last token only.
    Raises:
        AddressError, ShapeMismatch, EditError, InputError, BackendUnavailable: before anything runs.
        NotReached: an edit or recording did not happen.
    Cost: one forward; on `torch` each position that an edit of the recurrence touches costs one readable step. Outside
        torch.no_grad() logits and recordings keep what their gradients need, as of any torch model: of mamba-130m 2 MB
        a token, 0.8 MB on `compiled`.
    """
    return _run(model, ids, each(edits, Edit), each(record, Address), backend, state, keep_state, lengths, last_only)


def _run(
    model: Mamba, ids: Tensor, edits: Sequence[Edit], record: Sequence[Address], backend: str,
    state: MambaState | None, keep_state: bool, lengths: Lengths, last_only: bool,
    moves: Mapping[int, Toward] | None = None,
) -> Run:  # fmt: skip
    known(model)
    ops = resolve(backend, model.device)
    ids, sizes = model.check(ids, lengths, state)
    plan = Plan(model.config, edits, record, *span(ids, sizes, state), moves=moves)
    out = model.score(ids, sizes, state, keep_state, last_only, plan, ops)  # not traced where torch.compile wraps it
    return Run(ids, out.logits, sizes, out.state, ops.name, model.config.vocab_size, plan.results())


def known(model: object) -> None:
    """Raise InputError for what is no Mamba, such as a path or another library's model."""
    if not hasattr(model, "check"):  # not by its class: what torch.compile wraps is taken
        raise InputError(
            f"model is a {type(model).__name__}; give a Mamba: Mamba.from_pretrained(path), Mamba.from_module(module), "
            "or the .model of a HookedMamba."
        )


def span(ids: Tensor, sizes: Tensor, state: MambaState | None) -> tuple[Tensor, Tensor]:
    """(b,) the first position of each row in this run, and one past its last."""
    start = torch.zeros(len(ids), dtype=torch.long) if state is None else state.position
    return start, start + sizes


@torch.no_grad()
def generate(
    model: Mamba,
    ids: Tensor,
    n_tokens: int,
    edits: Edit | Iterable[Edit] = (),
    record: Address | Iterable[Address] = (),
    backend: str = "auto",
    lengths: Lengths = None,
    last_only: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> Run:
    """Go on from a prompt for `n_tokens` tokens, under the same edits as one pass over the result would have.

    Positions are absolute; negative ones count from the prompt's end, so that -1 is its last token, and an open slice
    goes on through what is generated. The last token generated is not run, so the last position is l + n_tokens - 2.

    Args:
        ids: (b, l) prompts, right-padded where `lengths` says so.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn with this temperature and `seed`. Rows of
            the embedding beyond the vocabulary are never chosen.
        last_only: keep only the logits that chose the new tokens, (b, n_tokens, v).
    Returns:
        Run with ids (b, l + n_tokens); row i holds its prompt, its n_tokens new tokens right behind it, then zeros.
        logits (b, l + n_tokens - 1, v). No gradients.
    Cost: one forward of the prompt and n_tokens - 1 steps.
    """
    if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 1:
        raise InputError(f"n_tokens={n_tokens!r}: at least 1, an int.")
    if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature!r}: a finite number, 0 (the likeliest token) or more.")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed={seed!r}: an int of 64 bits.")
    known(model)
    ops = resolve(backend, model.device)
    ids, sizes = model.check(ids, lengths)
    b, l = ids.shape
    start = torch.zeros(b, dtype=torch.long)
    plan = Plan(model.config, each(edits, Edit), each(record, Address), start, sizes + n_tokens - 1, origin=sizes)
    draw = torch.Generator(model.device).manual_seed(int(seed))
    heat = max(float(temperature), torch.finfo(torch.float32).tiny)
    chosen, steps, lost = list[Tensor](), list[Tensor](), list[Tensor]()

    def choose(logits: Tensor) -> Tensor:
        real = logits[:, : model.config.vocab_size]
        if temperature == 0:
            token = real.argmax(-1, keepdim=True)  # (b, 1), of a NaN if there is one
            lost.append(real.gather(1, token)[:, 0].isnan())
            return token
        refuse_nan(real.isnan().any(1)[None], len(steps))
        below = real.float() - real.float().amax(-1, keepdim=True)  # of which a tiny temperature makes 0 and -inf
        return torch.multinomial((below / heat).softmax(-1), 1, generator=draw)

    rows = torch.arange(b, device=ids.device)
    ends, one = sizes.to(ids.device), torch.ones_like(sizes)
    later = model.settled(ops if ops.begin is None else ops.begin(model, False, True))
    busy = plan.beyond(sizes)
    out = model.score(ids, sizes, None, True, last_only, plan, ops)
    last = out.logits[:, -1] if last_only else out.logits[rows, ends - 1]
    for i in range(n_tokens):
        token = choose(last)
        chosen.append(token)
        steps.append(last)
        if i < n_tokens - 1:
            tap = plan if i in busy else NO_TAP  # the plan has nothing to do at most tokens
            out_i = model.score(token, one, out.state, True, False, tap, later)
            out, last = out_i if last_only else type(out)(out.logits, out_i.state), out_i.logits[:, 0]
    if lost:
        refuse_nan(torch.stack(lost))  # once, not each token: it waits for the device
    whole = torch.cat([ids * (torch.arange(l, device=ids.device) < ends[:, None]), ids.new_zeros(b, n_tokens)], 1)
    whole.scatter_(1, ends[:, None] + torch.arange(n_tokens, device=ids.device), torch.cat(chosen, 1))
    if last_only:
        logits = torch.stack(steps, 1)
    else:
        logits = torch.cat([out.logits, out.logits.new_zeros(b, n_tokens - 1, out.logits.shape[-1])], 1)
        for i, step in enumerate(steps):
            logits[rows, ends - 1 + i] = step
    return Run(whole, logits, sizes + n_tokens, out.state, ops.name, model.config.vocab_size, plan.results())


def refuse_nan(lost: Tensor, first: int = 0) -> None:
    """Raises InputError if the logits that chose one of the new tokens from `first` on hold NaN: lost (tokens, b)."""
    if bool(lost.any()):
        token, row = lost.nonzero()[0].tolist()
        raise InputError(
            f"the logits of row {row} hold NaN where new token {token + first} is chosen, of which no token is the "
            "likeliest: look for where this model or an edit overflows, with run(model, ids, edits, "
            "record=[at.resid_post()])."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Gradients(Brief):
    """`gradients_[address]`: dMetric/dSite in the shape that the address records; `values` (b,), the metric."""

    values: Tensor
    records: Mapping[Address, Tensor] = field(repr=False)

    def __getitem__(self, address: Address) -> Tensor:
        if address not in self.records:
            made = ", ".join(map(str, self.records))
            raise NotRecorded(f"no gradient of {address} was asked for; there are {made}. Name it in wrt=[...].")
        return self.records[address].clone()


def gradients(
    model: Mamba,
    ids: Tensor,
    metric: Metric,
    wrt: Address | Iterable[Address],
    edits: Edit | Iterable[Edit] = (),
    backend: str = "auto",
    state: MambaState | None = None,
    lengths: Lengths = None,
) -> Gradients:
    """The gradient of a metric in any sites, from one forward and one backward.

    The gradient in a site is that of adding something to it, after all edits: for `ssm_state` it holds every way in
    which h_t acts on the metric, now and later; for `state_read` only what y_t reads.

    Args:
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        wrt: an address, or several. Rows do not see one another, so each row's gradient is that of its own metric.
            With an edit that makes them, a `Mean` over the batch, there is no such gradient, and it is refused.
    Returns:
        Gradients, zero where the metric does not depend on the site.
    Raises:
        MetricError, and what `run` raises; EditError for a mean over the batch; InputError also for weights, a state or
        edits made under inference mode.
    Cost: memory of what is asked, and on `torch` no readable steps for `ssm_state`, `state_write` and all sites along
        the sequence.
    """
    places, changes = list(dict.fromkeys(each(wrt, Address))), each(edits, Edit)
    if not places:
        raise InputError("wrt is empty: name at least one address, at.<site>(...).")
    return differentiate(model, ids, metric, places, changes, backend, state, lengths)[0]


def differentiate(
    model: Mamba, ids: Tensor, metric: Metric, places: Sequence[Address], changes: Sequence[Edit], backend: str,
    state: MambaState | None, lengths: Lengths, moves: Mapping[int, Toward] | None = None,
) -> tuple[Gradients, list[Tensor]]:  # fmt: skip
    """`gradients`, and the gradient in the size of each layer's move."""
    moves = moves or {}
    if mixing := [edit for edit in changes if isinstance(edit, Edit) and edit.over_batch]:
        raise EditError(
            f"{mixing[0]}: the mean over the batch lets each row act on the others' metrics, so that no row has a "
            "gradient of its own. Give the mean: Mean(address, mean)."
        )
    given = [getattr(edit, "value", None) for edit in changes]
    used = {"the model": [*model.parameters()], "an edit": [v for v in given if v is not None]}
    if state is not None:
        used["the state"] = [*state.ssm_state, *state.conv_state]
    for what, tensors in used.items():
        if any(t.is_inference() for t in tensors):
            raise InputError(
                f"{what} holds tensors made under torch.inference_mode(), through which no gradient flows. "
                "Make it outside, or under torch.no_grad()."
            )
    with torch.inference_mode(False), torch.enable_grad():
        ids, sizes = model.check(ids, lengths, state)
        shapes = Plan(model.config, (), places, *span(ids, sizes, state))
        zeros = [
            torch.zeros((), dtype=wide(model.dtype), device=model.device, requires_grad=True).expand(shapes.shape(a))
            for a in places
        ]
        probes = [Probe(a, zero) for a, zero in zip(places, zeros, strict=True)]
        last = lengths is not None
        done = _run(model, ids, [*changes, *probes], (), backend, state, False, lengths, last, moves)
        values = apply_metric(metric, done.logits)
        found = gradient(values, [*zeros, *(move.size for move in moves.values())])
    return Gradients(values.detach(), dict(zip(places, found, strict=False))), list(found[len(places) :])


def each(given: Iterable[T] | T, kind: type[T]) -> tuple[T, ...]:
    """One edit or address, or several, as a tuple; raises EditError for anything else."""
    alone = isinstance(given, Edit | Address | str) or not isinstance(given, Iterable)
    several = cast(tuple[T, ...], (given,) if alone else tuple(cast(Iterable[T], given)))
    for one in several:
        edit_or_address(one)
        if not isinstance(one, kind):
            what = "edits and not addresses" if kind is Edit else "addresses and not edits"
            raise EditError(
                f"{one} is given where {what} are meant; edits= takes Set, Add, ..., record= and wrt= at.<site>(...)."
            )
    return several


def apply_metric(metric: Metric, logits: Tensor) -> Tensor:
    """Call a metric, and see that it gave one number a row and left the logits as they were.

    Returns:
        (b,) float32 or wider: of bools, ints and 16 bits, too, differences and means are meant.
    """
    if not callable(metric):
        raise MetricError(f"metric={metric!r:.60} is no function of logits (b, l, v).")
    logits = countable(logits)
    before = written(logits)
    values = cast(object, metric(logits))
    if written(logits) != before:
        raise MetricError(
            "the metric writes into the logits that it is given, which other cells and metrics share. Let it write "
            "into a copy: logits = logits.clone()."
        )
    if not isinstance(values, Tensor) or values.shape != (len(logits),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise MetricError(f"a metric maps logits (b, l, v) to ({len(logits)},), one number a row; this one gave {got}.")
    if values.is_complex():
        raise MetricError(f"a metric gives real numbers; this one gave {values.dtype}.")
    return values.to(wide(values.dtype))


def gradient(values: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of what `apply_metric` gave, summed over the rows; zero where it does not depend on something."""
    if not values.requires_grad:
        raise MetricError("the metric gave numbers without a gradient (an argmax, an accuracy, a detached tensor).")
    return torch.autograd.grad(values.sum(), wrt, materialize_grads=True)


def same_shape(ids: Tensor, donor_ids: Tensor) -> None:
    """Raises InputError where base and donor are not as many rows of one length."""
    if ids.shape != donor_ids.shape:
        raise InputError(
            f"ids {tuple(ids.shape)} and donor_ids {tuple(donor_ids.shape)} differ in shape; "
            "rows and positions must match."
        )
