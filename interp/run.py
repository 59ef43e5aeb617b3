"""`run` and `gradients`: one call, from token ids and edits to numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor

from kernels_bridge import resolve
from minimal_mamba import Address, Edit, Mamba, MambaState, Plan
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.edits import edit_or_address
from minimal_mamba.errors import EditError, InputError, MambascopeError, MetricError, NotRecorded
from minimal_mamba.item import Probe
from minimal_mamba.scan import Ops
from minimal_mamba.tap import Toward

from .logits import GIVEN, countable, written

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
        last: (b,) where in `logits` the last of each row are; None: at the last of its tokens.
    `run_[address]` is a copy of what was recorded there.
    """

    ids: Tensor
    logits: Tensor
    lengths: Tensor
    kept: MambaState | None = field(repr=False)
    backend: str
    vocab_size: int
    records: Mapping[Address, Tensor] = field(repr=False)
    last: Tensor | None = field(default=None, repr=False)

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
        rows = torch.arange(len(self.logits), device=self.logits.device)
        return self.logits[rows, (self.lengths - 1 if self.last is None else self.last).to(self.logits.device)]


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
    model: Mamba, ids: Tensor, edits: Sequence[Edit], record: Sequence[Address], backend: str | Ops,
    state: MambaState | None, keep_state: bool, lengths: Lengths, last_only: bool,
    moves: Mapping[int, Toward] | None = None,
) -> Run:  # fmt: skip
    known(model)
    ops = backend if isinstance(backend, Ops) else resolve(backend, model.device)
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


@dataclass(frozen=True, eq=False, repr=False)
class Gradients(Brief):
    """`gradients_[address]`: dMetric/dSite in the shape that the address records; `values` (b,), the metric."""

    values: Tensor
    records: Mapping[Address, Tensor] = field(repr=False)
    kind: ClassVar[str] = "gradient"

    def __getitem__(self, address: Address) -> Tensor:
        if address not in self.records:
            made = ", ".join(map(str, self.records))
            raise NotRecorded(f"no {self.kind} of {address} was asked for; there are {made}. Name it in wrt=[...].")
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
    return differentiate(model, ids, metric, named(wrt), each(edits, Edit), backend, state, lengths)[0]


def named(wrt: Address | Iterable[Address]) -> list[Address]:
    """The addresses, each once; raises InputError where there is none."""
    places = list(dict.fromkeys(each(wrt, Address)))
    if not places:
        raise InputError("wrt is empty: name at least one address, at.<site>(...).")
    return places


def differentiate(
    model: Mamba, ids: Tensor, metric: Metric, places: Sequence[Address], changes: Sequence[Edit], backend: str | Ops,
    state: MambaState | None, lengths: Lengths, moves: Mapping[int, Toward] | None = None,
    record: Sequence[Address] = (), also: Sequence[Tensor] = (), within: AbstractContextManager[object] | None = None,
) -> tuple[Gradients, list[Tensor], Run]:  # fmt: skip
    """`gradients`; the gradient in the size of each layer's move and in the tensors `also`; the run, which recorded.

    Args:
        within: what the forward, and it alone, runs in.
    """
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
        with within or nullcontext():
            done = _run(model, ids, [*changes, *probes], record, backend, state, False, lengths, last, moves)
        values = apply_metric(metric, done.logits)
        found = gradient(values, [*zeros, *(move.size for move in moves.values()), *also])
    return Gradients(values.detach(), dict(zip(places, found, strict=False))), list(found[len(places) :]), done


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
    within = GIVEN.set(logits)
    try:
        values = cast(object, metric(logits))
    except (IndexError, RuntimeError) as error:
        if logits.shape[1] > 1 or isinstance(error, MambascopeError):
            raise
        raise MetricError(
            f"the metric failed on logits {tuple(logits.shape)} ({error}). With lengths= a metric is given each row's "
            "last token alone: let it read [:, -1] and nothing before, or give rows of one length without lengths=."
        ) from error
    finally:
        GIVEN.reset(within)
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


def donor_of(model: Mamba, ids: Tensor, donor_ids: Tensor, state: MambaState | None = None) -> Tensor:
    """A copy of the donor's ids; InputError where they cannot run, or do not fit the base's in shape."""
    donor_ids, _ = model.check(donor_ids, state=state, name="donor_ids", state_name="donor_state")
    if ids.shape != donor_ids.shape:
        raise InputError(
            f"ids {tuple(ids.shape)} and donor_ids {tuple(donor_ids.shape)} differ in shape; "
            "rows and positions must match."
        )
    return donor_ids
