"""From hooks to edits: the hooks of one run as `Apply` edits, and after the run the values of names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minimal_mamba import SITES, Address, Apply, Edit, Mamba, MambaState, at
from minimal_mamba.address import address_of
from minimal_mamba.errors import EditError, InputError

from .hook_names import DERIVED, START, A, Point

HookFn = Callable[..., Tensor | None]  # fn(value, hook=HookPoint) -> what replaces it; None: the value, as fn left it


@dataclass(frozen=True)
class HookPoint:
    """What a hook function is given beside the value.

    Args:
        name: as the hook was given it.
        ctx: what hooks keep for one another: one dict a hooked value, for all its hooks of one run, also under aliases.
            (TransformerLens' lives until `clear_contexts`; here nothing outlives its run.)
    """

    name: str
    ctx: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def layer(self) -> int:
        """The layer of its name; InputError where it has none."""
        if not self.name.startswith("blocks."):
            raise InputError(f"{self.name} belongs to no layer.")
        return int(self.name.split(".")[1])


class Compiled:
    """The hooks of one run, as edits and an initial state; afterwards, the values of names."""

    def __init__(self, model: Mamba, points: Sequence[tuple[Point, HookFn]], ids: Tensor):
        self.model, self.ids = model, ids
        self.seen: dict[tuple[str, int], list[Tensor]] = {}
        self.values: dict[tuple[str, int], Tensor] = {}  # of what a hook on a derived name made
        derived: dict[tuple[str, int], list[Callable[[Tensor], Tensor]]] = {}
        direct: list[Edit] = []
        self.starts: dict[int, Tensor] = {}
        self.times: dict[int, list[int]] = {}  # positions of the states that are to be kept, by layer
        shared: dict[tuple[str, int | None], dict[str, Any]] = {}
        for point, fn in points:
            ctx = shared.setdefault((point.kind, point.layer), {})
            hooked = partial(_call, fn, HookPoint(point.name, ctx))
            if point.address is not None:
                direct.append(Apply(point.address, hooked))
            elif point.kind == A:
                raise EditError(
                    f"{point.name} is a parameter, -exp(A_log), no activation. Hook hook_A_bar, or change the model."
                )
            elif point.kind == START:
                layer = _layer(point)
                start = self.starts.get(layer, model.initial_state(len(ids)).ssm_state[layer])
                self.starts[layer] = hooked(start.clone()).to(start)
            else:
                derived.setdefault((point.kind, _layer(point)), []).append(hooked)
        into = [(DERIVED[kind].target, layer) for kind, layer in derived]
        if len(set(into)) < len(into):
            raise EditError(f"hooks on {', '.join(kind for kind, _ in derived)} of one layer both replace its writes.")
        first, last = [], []
        for (kind, layer), fns in derived.items():
            first += self._target(kind, layer, fns)
            for site in DERIVED[kind].needs:
                if (site, layer) not in self.seen:
                    self.seen[site, layer] = []
                    last.append(Apply(address_of(site, layer), partial(_keep, self.seen[site, layer])))
        self.edits = [*first, *direct, *last]  # so that a derived value is made of what the other hooks left

    @property
    def state(self) -> MambaState | None:
        """The memory to start from, where `hook_h_start` was hooked."""
        if not self.starts:
            return None
        blank = self.model.initial_state(len(self.ids))
        h = tuple(self.starts.get(i, s).to(s.dtype) for i, s in enumerate(blank.ssm_state))
        return MambaState(h, blank.conv_state, blank.position)

    def _target(self, kind: str, layer: int, fns: Sequence[Callable[[Tensor], Tensor]]) -> list[Edit]:
        rule, module = DERIVED[kind], self.model.backbone.layers[layer]
        written: list[Tensor] = []

        def seen(site: str) -> Tensor:
            parts = self.seen[site, layer]
            return torch.stack(parts, 1) if SITES[site].per_position else parts[0]

        def put(t: int | None, old: Tensor) -> Tensor:
            if not written:  # once a run, when the first position of the target is reached
                value = rule.read(module, seen)
                for fn in fns:
                    value = fn(value.clone()).to(value)
                self.values[kind, layer] = value
                written.append(rule.write(module, seen, value))
            return written[0] if t is None else written[0][:, t]

        if not SITES[rule.target].per_position:
            return [Apply(address_of(rule.target, layer), partial(put, None))]
        return [Apply(address_of(rule.target, layer, pos=t), partial(put, t)) for t in range(self.ids.shape[1])]

    def record(self, wanted: Sequence[Point]) -> list[Address]:
        """What to record so that `value` can be told of these names."""
        found: list[Address] = []
        for point in wanted:
            if point.kind.startswith("hook_h."):
                self.times.setdefault(_layer(point), []).append(_time(point))
            elif point.address is not None:
                found.append(point.address)
            elif point.kind in DERIVED:
                rule = DERIVED[point.kind]
                found += [address_of(site, point.layer) for site in ((rule.target,) if rule.whole else rule.needs)]
        self.times = {layer: sorted(set(times)) for layer, times in self.times.items()}
        return list(dict.fromkeys(found + [at.ssm_state(layer=i, pos=times) for i, times in self.times.items()]))

    def value(self, point: Point, records: Mapping[Address, Tensor]) -> Tensor:
        """The value of a name after the run."""
        if point.address is not None and not point.kind.startswith("hook_h."):
            return records[point.address]
        layer = _layer(point)
        module = self.model.backbone.layers[layer]
        if point.address is not None:
            times = self.times[layer]
            return records[at.ssm_state(layer=layer, pos=times)][:, times.index(_time(point))]
        if point.kind == A:
            return module.mixer.A(module.mixer.A_log.dtype)
        if point.kind == START:
            start = self.starts.get(layer)
            return self.model.initial_state(len(self.ids)).ssm_state[layer] if start is None else start
        rule = DERIVED[point.kind]
        if rule.whole:
            return rule.whole(records[address_of(rule.target, layer)])
        if (point.kind, layer) in self.values:
            return self.values[point.kind, layer]
        return rule.read(module, lambda site: records[address_of(site, layer)])


def _time(point: Point) -> int:
    return int(point.kind.split(".")[1])


def _layer(point: Point) -> int:
    assert point.layer is not None
    return point.layer


def _call(fn: HookFn, hook: HookPoint, value: Tensor) -> Tensor:
    shape = value.shape
    out: Any = fn(value, hook=hook)
    if out is None:
        return value
    if not isinstance(out, Tensor) or out.shape != shape or not out.is_floating_point():
        got = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise EditError(f"the hook on {hook.name} must return shape {tuple(shape)}, floating point; it returned {got}.")
    return out.to(value.device)


def _keep(into: list[Tensor], value: Tensor) -> Tensor:
    into.append(value)
    return value
