"""Sweeps of knockouts: one source and window of layers at a time, of which nothing is computed twice.

Below its window a cell is the base run, and above it what the base run is at all positions before the target. So only
the window runs whole, and the layers above it from the target on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Mamba, Plan
from minimal_mamba.address import resolve, selector
from minimal_mamba.block import Memory
from minimal_mamba.brief import Brief
from minimal_mamba.errors import InputError

from .cutter import Cutter
from .knockout import Baseline, Knockout, baseline_of, cuts_of
from .logits import Logits
from .positions import one_position
from .run import Lengths, Metric, apply_metric, known, span
from .sweep.base import Base
from .sweep.engine import rows_at_once
from .sweep.grid import standard_error
from .sweep.patch import LayerSpec, chosen_layers


@dataclass(frozen=True, eq=False, repr=False)
class KnockoutGrid(Brief):
    """What cutting each source from one target, in each window of layers, does to a metric.

    Args:
        values: (windows, sources, b) the metric under one knockout, raw, in its unit.
        base: (b,) the metric of the run without one.
        layers: of each window. sources: positions. target: position. through: the routes that were cut.
    """

    values: Tensor
    base: Tensor
    layers: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]
    target: int
    through: tuple[str, ...]

    def effect(self) -> Tensor:
        """values - base, (windows, sources, b)."""
        return self.values - self.base

    def error(self) -> Tensor:
        """(windows, sources): one standard error of the mean effect, over the rows of the batch."""
        return standard_error(self.effect())


@torch.no_grad()
def knockout_grid(
    model: Mamba,
    ids: Tensor,
    metric: Metric,
    *,
    target: int = -1,
    sources: int | slice | Sequence[int] | None = None,
    layers: LayerSpec = None,
    window: int = 1,
    through: str | Sequence[str] = "all",
    baseline: Baseline = "zero",
    lengths: Lengths = None,
    backend: str = "auto",
    batch: int | None = None,
    progress: bool = True,
) -> KnockoutGrid:
    """Cut one source at a time from one target, in one window of layers at a time.

    Args:
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        target: the position that reads. sources: all that are at or before it in every row, if None.
        layers: the windows, as in `patch_grid`: a tuple of layers in a list is cut at once. None: every `window`
            successive layers.
        through, baseline: as in `knockout`.
        batch: rows at a time, of which each cell takes b; None: 256, or of long prompts as many as hold 8,192 tokens.
    Returns:
        KnockoutGrid; every cell equals one `knockout`.
    Cost: some forwards of the batch, and for each cell the layers of its window with b (1 + m) rows, m as in
        `knockout`, and those above from the target on.
    """
    known(model)
    ids, sizes = model.check(ids, lengths)
    b, n_layer = len(ids), model.config.n_layer
    if not 1 <= window <= n_layer or (layers is not None and window != 1):
        raise InputError(f"window={window}: 1 to {n_layer} layers, and none where layers= names the windows.")
    room = rows_at_once(batch, 256, ids.shape[1])
    target = one_position(target)
    if layers is None:
        layers = [tuple(range(i, i + window)) for i in range(n_layer - window + 1)]
    groups = [tuple(group) for group in chosen_layers(layers, "mixer_out", n_layer)]
    places = [resolve(target, int(size), "target")[0] for size in sizes]
    if sources is None:
        probe = Knockout(0, target, 0, through)
        sources = range(min(places) + (0 if probe.through == ("conv",) else 1))
    columns = resolve(selector(sources, "source"), int(sizes.min()), "source")
    base = Base(model, ids, lengths, backend)
    base.read(min(map(min, groups)))
    first = min(places)  # before it the cut runs are the base run
    memories = {i: (h[0], window[0]) for i, (h, window) in base.before(torch.full((1, b), first))[0].items()}
    fixed = baseline_of(model, ids, baseline, (), lengths, backend)
    step = max(1, room // b)
    values = []
    with tqdm(total=len(groups) * len(columns), desc=f"knockout {through}", disable=not progress) as bar:
        for group in groups:
            for some in (columns[i : i + step] for i in range(0, len(columns), step)):
                cuts = [
                    Knockout(source, target, group, through, rows=range(i * b, (i + 1) * b))
                    for i, source in enumerate(some)
                ]
                for logits in _cells(base, cuts, group, fixed, first, memories):
                    values.append(apply_metric(metric, logits))
                bar.update(len(some))
    grid = torch.stack(values).unflatten(0, (len(groups), len(columns)))
    return KnockoutGrid(
        grid, base.logits(metric), tuple(groups), tuple(columns), target, Knockout(0, 0, 0, through).through
    )


def _cells(
    base: Base, cuts: Sequence[Knockout], group: Sequence[int], baseline: Tensor, first: int,
    memories: Mapping[int, Memory],
) -> Iterator[Tensor]:  # fmt: skip
    """The logits of each knockout of these layers, whose rows stand one after the other, as a metric takes them.

    Args:
        first: the position before which nothing is cut; memories: of each layer there, in the base run.
    """
    model, cells, (b, l) = base.model, len(cuts), base.ids.shape
    sizes = base.sizes.repeat(cells)
    layers = cuts_of(model, cuts, sizes, l)
    start, stop = span(base.ids.repeat(cells, 1), sizes, None)
    plan = Plan(model.config, (), (), start, stop)
    wide_baseline = baseline if baseline.shape[1] == 1 else baseline.repeat(1, cells, 1, 1)
    tap = Cutter(model, [plan], plan, layers, wide_baseline)
    mask, blank = model.mask(sizes, l), model.initial_state(1)
    fresh, later = (base.ops if base.ops.begin is None else base.ops.begin(model, new, False) for new in (True, False))
    resid = (base.streams[min(group)] if min(group) else model.embed(base.ids)).repeat(cells, 1, 1)
    for i in range(min(group), max(group) + 1):
        h, window = (part[i].repeat(cells * b, 1, 1) for part in (blank.ssm_state, blank.conv_state))
        resid = tap.run(i, resid, (h, window), mask, fresh)
    resid, mask = resid[:, first:], None if mask is None else mask[:, first:]
    for i in range(max(group) + 1, base.depth):
        h, window = (part.repeat(cells, 1, 1) for part in memories[i])
        resid = tap.run(i, resid, (h, window), mask, later)
    last = model.head(resid, sizes - first, last_only=True)  # (cells b, 1, v)
    if base.padded:
        yield from last.split(b)
        return

    def whole(mine: Tensor) -> Tensor:
        before = model.head(base.streams[base.depth], base.sizes)[:, :first]
        return torch.cat([before, model.head(mine, base.sizes - first)], 1)

    for own, mine in zip(last[:, 0].split(b), resid.split(b), strict=True):
        yield Logits(own, l, partial(whole, mine))
