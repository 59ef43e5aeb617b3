"""How a knockout runs: in a layer with cuts every row of the batch stands several times.

Block 0 is the run. Block i > 0 makes the outputs of the targets that are cut from one set of sources: at the layer's
entrance it takes over block 0's values, without what is cut; at its exit block 0 takes the targets' outputs from there.
All of it is moves between rows of whole tensors, so a scan is never broken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimal_mamba import Mamba, Ops, Plan, Tap
from minimal_mamba.block import Memory
from minimal_mamba.errors import InputError

ROUTES = ("scan", "conv", "selection", "all")
CUT = ("mixer_in", "x", "z", "conv", "dt_low", "B", "C", "mixer_out")  # the sites at which a cut acts
MADE = ("conv", "mixer_out")  # those that it makes, where edits change what it made

# the sources of one target: a set of positions for each route
Sources = Mapping[str, frozenset[int]]


@dataclass(frozen=True, eq=False)
class Slot:
    """What one block leaves out: at which positions, as masks (b, l).

    Args:
        into: `mixer_in` is the baseline there. every: the gate is made of the baseline too.
        own: the token's own tap of the conv is put back, so that only later tokens miss it.
        mute: nothing is written into the state. select: the number of the block whose dt_low, B and C are taken.
    """

    into: Tensor
    every: Tensor
    own: Tensor
    mute: Tensor
    select: int


@dataclass(frozen=True, eq=False)
class LayerCuts:
    """The blocks of one layer, and from which of them (0: none) each position's output is taken, (b, l)."""

    slots: tuple[Slot, ...]
    take: Tensor


def layer_cuts(rows: Sequence[Mapping[int, Sources]], length: int, device: torch.device) -> LayerCuts:
    """Arrange blocks for the sources of each target, {target: sources} a row; targets with the same ones share one."""
    b = len(rows)
    sets = [list(dict.fromkeys(tuple(sorted(s.items())) for s in row.values())) for row in rows]
    take, slots = torch.zeros(b, length, dtype=torch.long), list[Slot]()
    for j in range(max(map(len, sets))):
        masks = {route: torch.zeros(b, length, dtype=torch.bool) for route in ROUTES}
        for row, mine in enumerate(sets):
            for route, sources in mine[j] if j < len(mine) else ():
                masks[route][row, list(sources)] = True
        masks = {route: mask.to(device) for route, mask in masks.items()}
        every, none = masks["all"], torch.zeros_like(masks["all"])
        own, chosen = masks["conv"] & ~every, masks["selection"] | every
        here = len(slots) + 1
        if not own.any() and not (chosen & ~every).any():
            select = here  # its own are right
        elif not chosen.any():
            select = 0
        else:  # a block of its own, with what is left out of dt, B and C left out of everything
            slots.append(Slot(chosen, chosen, none, none, here))
            select, here = here, here + 1
        slots.append(Slot(masks["conv"] | every, every, own, masks["scan"], select))
        for row, mine in enumerate(sets):
            if j < len(mine):
                targets = [t for t, s in rows[row].items() if tuple(sorted(s.items())) == mine[j]]
                take[row, targets] = here
    return LayerCuts(tuple(slots), take.to(device))


class Cutter(Tap):
    """A run with cuts, layer by layer, and the tap of what lies before and after the layers.

    Args:
        edits: a plan for each block of the largest layer; record: the plan of what block 0 keeps. Both have begun.
        layers: the cuts of each layer that has some.
        baseline: (n_layer, b or 1, l or 1, d).
    """

    def __init__(
        self, model: Mamba, edits: Sequence[Plan], record: Plan, layers: Mapping[int, LayerCuts], baseline: Tensor
    ):
        self.model, self.edits, self.kept, self.layers, self.baseline = model, edits, record, layers, baseline

    def run(self, layer: int, resid: Tensor, memory: Memory, mask: Tensor | None, ops: Ops) -> Tensor:
        """One layer: the residual stream before it (b, l, d), its memory, mask (b, l) -> the stream after it."""
        blocks = 1 + len(self.layers[layer].slots) if layer in self.layers else 1
        h, window = (part.repeat(blocks, 1, 1) for part in memory)
        wider = None if mask is None else mask.repeat(blocks, 1)
        tap = _LayerCutter(self, layer)
        after, *_ = self.model.backbone.layers[layer](resid.repeat(blocks, 1, 1), (h, window), wider, tap, ops)
        return after[: len(resid)]

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        return self.pass_by(site, None, value, t)

    def touches(self, *sites: str) -> bool:
        return any(plan.touches(*sites) for plan in (self.edits[0], self.kept))

    def pass_by(
        self, site: str, layer: int | None, value: Tensor, t: int | None, cut: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Edit every block, cut, and record block 0."""
        b = len(self.kept.start)
        if cut is not None and site in MADE:
            value = cut(site, value, b)
        if (site, layer) in self.edits[0].items:
            blocks = zip(self.edits, value.split(b), strict=False)  # plans for the largest layer, blocks of this one
            value = torch.cat([plan.pass_by(site, layer, block, t) for plan, block in blocks])
        if cut is not None and site not in MADE:
            value = cut(site, value, b)
        if (site, layer) in self.kept.items:
            self.kept.pass_by(site, layer, value[:b], t)
        return value


class _LayerCutter(Tap):
    """A knockout seen from one layer. `lost` keeps, from `x` to `conv`, what the sources' own taps miss."""

    def __init__(self, cutter: Cutter, layer: int):
        self.cutter, self.layer = cutter, layer
        self.cuts = cutter.layers.get(layer)
        self.edits = cutter.edits[0].at_layer(layer)
        self.kept = cutter.kept.at_layer(layer)
        self.lost: list[Tensor] = []

    def edited(self, *sites: str) -> list[int]:
        return self.edits.edited(*sites)

    def recorded(self, *sites: str) -> list[int]:
        return self.kept.recorded(*sites)

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        self.kept.record(site, values[: len(self.cutter.kept.start)], times)

    def touches(self, *sites: str) -> bool:
        cut = self.cuts is not None and any(site in CUT for site in sites)
        return cut or self.edits.touches(*sites) or self.kept.touches(*sites)

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        return self.cutter.pass_by(site, self.layer, value, t, None if self.cuts is None else self._cut)

    def _cut(self, site: str, value: Tensor, b: int) -> Tensor:
        if site not in CUT:
            return value
        assert self.cuts is not None
        main, *blocks = value.split(b)
        slots = self.cuts.slots
        if site == "mixer_in":
            baseline = self._baseline(main)
            blocks = [torch.where(slot.into[..., None], baseline, main) for slot in slots]
        elif site == "x":
            self.lost = [main - block for block in blocks]
        elif site == "z":
            for i, slot in enumerate(slots):
                blocks[i] = torch.where(slot.every[..., None], blocks[i], main)
        elif site == "conv":
            newest = self.cutter.model.backbone.layers[self.layer].mixer.conv1d.weight[:, 0, -1]  # (e,)
            for i, slot in enumerate(slots):
                blocks[i] = torch.where(slot.own[..., None], blocks[i] + newest * self.lost[i], blocks[i])
        elif site == "mixer_out":
            for i, block in enumerate(blocks):
                main = torch.where((self.cuts.take == i + 1)[..., None], block, main)
        else:
            blocks = [(main, *blocks)[slot.select] for slot in slots]
            if site == "B":
                for i, slot in enumerate(slots):  # without B nothing is written, and nothing else changes
                    blocks[i] = blocks[i].masked_fill(slot.mute[..., None], 0)
        return torch.cat([main, *blocks])

    def _baseline(self, main: Tensor) -> Tensor:
        assert self.cuts is not None
        made = self.cutter.baseline[self.layer].to(main.dtype).expand_as(main)  # (b, l, d)
        used = torch.stack([slot.into for slot in self.cuts.slots]).any(0)
        if bool(made[used].isnan().any()):
            raise InputError(f"the baseline holds NaN at a source of layer {self.layer}; give numbers there.")
        return made
