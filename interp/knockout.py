r"""Token-to-token knockout: cut what one token gives to another inside chosen layers, route by route.

A source s reaches the output of a target t >= s in one layer by these routes. With x' the conv inputs in which the
sources' `mixer_in` is the baseline, S the sources that are cut from t, and conv_r = bias + sum_i w[:, i] x_{r-k+1+i}:

    scan       t does not read what s wrote: the entry (t, s) of the matrix form is 0
    conv       no other token takes s into its content:     u_r  from x_r and x'_q of the tokens q < r, for all r <= t
    selection  no token takes s into dt, B and C:           dt'_r, B'_r, C'_r  from x', for all r <= t
    all        s is not there:                              u', dt', B', C', and for s = t the gate, from the baseline

    out_t = out_proj(gate_t (D u_t + sum_{r<=t} C_t prod_{r<q<=t} exp(dt_q A) dt_r B_r u_r)), no r that the scan cuts

Each route alters the `mixer_out` of the targets and nothing else in the layer: what later tokens read is as it was.
`conv` and `selection` act only through the k - 1 tokens after s (and, for dt and B, s itself), `scan` through what s
wrote, in which the tokens before it have a share by the conv. So `scan` alone, the usual knockout, leaks: s lives on in
the next tokens. `scan`, `conv` and `selection` together cut s from every t > s, and so does `all`, which leaves at s a
token whose input is the baseline. Only the layer's mixer is cut: the residual stream of t, and what other layers bring,
are not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels_bridge import resolve as resolve_backend
from minimal_mamba import Address, Apply, Edit, Mamba, Plan, at
from minimal_mamba.address import resolve, row_selector, selector, shown
from minimal_mamba.block import wide
from minimal_mamba.errors import AddressError, EditError, InputError, nearest

from .cutter import ROUTES, Cutter, LayerCuts, layer_cuts
from .positions import of_tokens
from .run import Lengths, Run, each, known, run, span

Baseline = str | Tensor


@dataclass(frozen=True)
class Knockout:
    """Cut every source from every target that is not before it, in every one of the layers.

    Args:
        source, target: positions: an int, a slice or a list, as in `at`; negative ones count from a row's own end.
        layer: likewise.
        through: a route, or several: "scan", "conv", "selection", "all".
        rows: of the batch; all if None.
    A value: it prints, compares and hashes by content. Source = target cuts what a token gives to itself; through the
    conv that is nothing, as a token's own tap is no route between tokens. Nor has the conv a tap of a token k or more
    before, which then changes nothing.
    """

    source: Any
    target: Any
    layer: Any
    through: Any = "all"
    rows: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        routes = (self.through,) if isinstance(self.through, str) else tuple(self.through)
        for name in routes:
            if name not in ROUTES:
                raise EditError(f"through={name!r} is no route.{nearest(str(name), ROUTES)} All: {', '.join(ROUTES)}.")
        if not routes:
            raise EditError(f"through={self.through!r}: name at least one of {', '.join(ROUTES)}.")
        normal: dict[str, object] = {f: selector(getattr(self, f), f) for f in ("source", "target", "layer")}
        normal["through"] = tuple(r for r in ROUTES if r in routes)
        if self.rows is not None:
            normal["rows"] = row_selector(self.rows)
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def pairs(self, length: int) -> dict[int, list[int]]:
        """The sources that are cut from each target, in a row of this length.

        Raises:
            AddressError: a position that the row has not, or one that is in no pair: a target before every source.
        """
        try:
            sources, targets = (
                resolve(sel, length, what) for sel, what in ((self.source, "source"), (self.target, "target"))
            )
        except AddressError as error:
            raise AddressError(f"{self}: {error}") from None
        least = 1 if self.through == ("conv",) else 0
        found = {t: [s for s in sources if s <= t - least] for t in targets}
        idle = [t for t, mine in found.items() if not mine] or sorted({*sources}.difference(*found.values()))
        if idle:
            what = "target" if idle[0] in found and not found[idle[0]] else "source"
            rule = "a target comes after its source" + ("" if least else ", or is its source")
            raise AddressError(
                f"{self}: {what} {idle[0]} is in no pair, of sources {sources}, targets {targets}: {rule}."
            )
        return found

    def __str__(self) -> str:
        parts = [f"{name}={shown(getattr(self, name))}" for name in ("source", "target", "layer")]
        parts.append(f"through={(self.through[0] if len(self.through) == 1 else list(self.through))!r}")
        return f"Knockout({', '.join(parts + ([] if self.rows is None else [f'rows={shown(self.rows)}']))})"

    __repr__ = __str__


def knockout(
    model: Mamba,
    ids: Tensor,
    cuts: Knockout | Iterable[Knockout],
    *,
    record: Address | Iterable[Address] = (),
    edits: Edit | Iterable[Edit] = (),
    baseline: Baseline = "zero",
    lengths: Lengths = None,
    backend: str = "auto",
    last_only: bool = False,
) -> Run:
    """Run a model once with tokens cut from one another.

    Knockouts of one target add up, each source by its own routes; targets of one layer can have different sources.
    The cuts of a layer see the cuts of the layers below.

    Args:
        ids: (b, l) token ids.
        record: addresses to keep, with the knockouts done. edits: done wherever they name a place, also where the cut
            outputs are made.
        baseline: of the sources' `mixer_in`, for all routes but the scan. "zero"; "mean", of each layer over all tokens
            of the run without knockouts; or a tensor (d,), (n_layer, d), or (n_layer, b, l, d), such as a donor's
            recording of `at.mixer_in()`.
        lengths, backend, last_only: as in `run`.
    Returns:
        Run. With "all" no value of `mixer_in` at a source of that layer changes a bit of `mixer_out` at its targets.
    Raises:
        AddressError, EditError, InputError: before anything runs.
    Cost: one forward, whose layers with cuts have b (1 + m) rows, m the most sets of sources that targets of one row
        are cut from in that layer; one more for each set with "selection", or with "conv" beside "all". On `torch` no
        readable steps.
    Source: Geva et al. 2023 (arXiv:2304.14767) for attention; Endy et al. 2025 (arXiv:2505.24244) for Mamba's scan.
        Differs: any routes and pairs; in their code the sources are cut from all targets together, in the scan only.
    """
    found = (cuts,) if isinstance(cuts, Knockout) else tuple(cuts)
    if not found or not all(isinstance(cut, Knockout) for cut in found):
        raise EditError(f"cuts={found!r}: give at least one Knockout(source, target, layer), and Knockouts only.")
    known(model)
    ops = resolve_backend(backend, model.device)
    ids, sizes = model.check(ids, lengths)
    b, l = ids.shape
    layers = cuts_of(model, found, sizes, l)
    blocks = 1 + max(len(layer.slots) for layer in layers.values())
    changes, places = each(edits, Edit), each(record, Address)
    start, stop = span(ids, sizes, None)
    plans = [Plan(model.config, changes, (), start, stop) for _ in range(blocks)]
    kept = Plan(model.config, (), places, start, stop)
    for plan in (*plans, kept):
        plan.begin(start, sizes)
    tap = Cutter(model, plans, kept, layers, baseline_of(model, ids, baseline, changes, lengths, backend))
    if ops.begin is not None:
        ops = ops.begin(model, True, False)
    mask, before = model.mask(sizes, l), model.initial_state(b)
    resid = model.embed(ids, tap)
    for i, memory in enumerate(zip(before.ssm_state, before.conv_state, strict=True)):
        resid = tap.run(i, resid, memory, mask, ops)
    logits = model.head(resid, sizes, mask, last_only, tap)
    plans[0].results()  # raises for an edit that did not happen
    return Run(ids, logits, sizes, None, ops.name, model.config.vocab_size, kept.results())


@torch.no_grad()
def knockout_leak(
    model: Mamba,
    ids: Tensor,
    cuts: Knockout | Iterable[Knockout],
    *,
    baseline: Baseline = "zero",
    lengths: Lengths = None,
    backend: str = "auto",
    scale: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """How far the targets' `mixer_out` moves when the sources' `mixer_in` of that layer is replaced by noise.

        max over layers and targets |change of mixer_out| / sqrt(mean over the layer's tokens |mixer_out|^2)

    Args:
        scale: standard deviation of the noise; `mixer_in` itself is of order one, so 1.0 is like another token.
    Returns:
        Of each knockout the largest change, as a share of what the layer writes: 0.0 where nothing leaks, 1.0 where as
        much as it writes. "all" gives 0.0 exactly, and so do "scan", "conv" and "selection" together where
        no target is a source.
    Cost: one `knockout`, and one more a knockout and layer.
    """
    found = (cuts,) if isinstance(cuts, Knockout) else tuple(cuts)
    known(model)
    everything = at.mixer_out()
    fixed = baseline_of(model, model.check(ids, lengths)[0], baseline, (), lengths, backend)

    def outputs(edits: Sequence[Edit]) -> Tensor:
        made = knockout(
            model, ids, found, record=everything, edits=edits, baseline=fixed, lengths=lengths, backend=backend
        )[everything]
        return made.to(wide(made.dtype))  # squares of 16 bits overflow

    before, sizes = outputs(()), model.check(ids, lengths)[1]
    real = (torch.arange(before.shape[2]) < sizes[:, None]).to(before.device)  # (b, l)
    written = before.norm(dim=-1)[:, real].square().mean(1).sqrt()  # (layers,)
    draw = torch.Generator(model.device).manual_seed(seed)

    def noise(old: Tensor) -> Tensor:
        return scale * torch.randn(old.shape, generator=draw, dtype=old.dtype, device=old.device)

    changes = []
    for cut in found:
        largest = before.new_zeros(())
        for layer in resolve(cut.layer, model.config.n_layer, "layer"):
            place = at.mixer_in(layer=layer, pos=cut.source)
            moved = (outputs([Apply(place, noise, rows=cut.rows)])[layer] - before[layer]).norm(dim=-1)  # (b, l)
            share = moved / written[layer].clamp(min=torch.finfo(moved.dtype).tiny)  # nothing of nothing is nothing
            rows = range(len(ids)) if cut.rows is None else resolve(cut.rows, len(ids), "row")
            targets = [(row, t) for row in rows for t in cut.pairs(int(sizes[row]))]
            largest = torch.stack([largest, *(share[row, t] for row, t in targets)]).max()  # NaN stays NaN
        changes.append(float(largest))
    return changes


def cuts_of(model: Mamba, cuts: Sequence[Knockout], sizes: Tensor, length: int) -> dict[int, LayerCuts]:
    """What is cut in each layer."""
    wanted: dict[int, list[dict[int, dict[str, set[int]]]]] = {}  # layer -> a row -> target -> route -> sources
    each = sizes.tolist()
    for cut in cuts:
        try:
            layers = resolve(cut.layer, model.config.n_layer, "layer")
            rows = range(len(each)) if cut.rows is None else resolve(cut.rows, len(each), "row")
        except AddressError as error:
            raise AddressError(f"{cut}: {error}") from None
        pairs = {size: cut.pairs(size) for size in {each[row] for row in rows}}
        for row in rows:
            for target, sources in pairs[each[row]].items():
                for layer in layers:
                    here = wanted.setdefault(layer, [{} for _ in each])[row].setdefault(target, {})
                    for route in cut.through:
                        here.setdefault(route, set()).update(sources)
    return {
        layer: layer_cuts(
            [{t: {route: frozenset(s) for route, s in mine.items()} for t, mine in row.items()} for row in rows],
            length, model.device,
        )
        for layer, rows in wanted.items()
    }  # fmt: skip


def baseline_of(
    model: Mamba, ids: Tensor, given: Baseline, edits: Sequence[Edit], lengths: Lengths, backend: str
) -> Tensor:
    """The baseline as (n_layer, b or 1, l or 1, d)."""
    n_layer, d, (b, l) = model.config.n_layer, model.config.d_model, ids.shape
    if isinstance(given, str):
        if given == "zero":
            return torch.zeros(n_layer, 1, 1, d, dtype=model.dtype, device=model.device)
        if given != "mean":
            raise InputError(f'baseline={given!r}: "zero", "mean" or a tensor.{nearest(given, ("zero", "mean"))}')
        place = at.mixer_in()
        with torch.no_grad():
            out = run(model, ids, edits, place, backend, lengths=lengths, last_only=True)
        return of_tokens(out, place).mean(1)[:, None, None]
    value = torch.as_tensor(given).to(model.device)
    fits = [(d,), (n_layer, d), (n_layer, b, l, d), (n_layer, 1, 1, d)]
    if tuple(value.shape) not in fits:
        raise InputError(f"baseline has shape {tuple(value.shape)}; it is one of {', '.join(map(str, fits[:3]))}.")
    return value if value.dim() == 4 else value.expand(n_layer, d)[:, None, None]
