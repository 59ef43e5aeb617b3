"""Bisect: the first site at which two implementations of the same weights part."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from minimal_mamba import Mamba

from .draw import draw_ids
from .first import First, first_to_part
from .rows import Row, at_worst, compare, errors, relative, short
from .targets import imported, readable, reference, roundings, same_weights, target
from .theirs import Theirs
from .watch import Implementation, Key, of_layers


@dataclass(frozen=True)
class Part:
    """One quantity: how far the two are from each other, and each from the readable model in float64."""

    stage: str
    quantity: str
    layer: int | None
    apart: float
    a_off: float
    b_off: float
    bound: float
    worst: float | None
    worst_bound: float | None

    @property
    def parted(self) -> bool:
        """Whether they are further apart than rounding explains, as a whole or at one position."""
        local = self.worst is None or self.worst_bound is None or self.worst <= self.worst_bound
        return not (self.apart <= self.bound and local)


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found. `first` is the first site, in the forward's order, with every layer fed the same input."""

    a: str
    b: str
    parts: list[Part]
    first: First | None

    @property
    def parted(self) -> bool:
        """Whether any quantity parts."""
        return any(p.parted for p in self.parts)

    def __str__(self) -> str:
        head = (
            f"{'stage':<10} {'quantity':<28} {'layer':>5} {'apart':>8} {'bound':>8} {'worst':>8} {'bound':>8} "
            f"{'a off':>8} {'b off':>8}"
        )
        lines = [
            f"a = {self.a}, b = {self.b}; off: relative error against the readable model in float64; "
            "worst: apart at the worst position, or in the worst channel of a gradient",
            head,
        ]
        for p in self.parts:
            layer = "" if p.layer is None else str(p.layer)
            mark = "  PARTS" if p.parted else ""
            lines.append(
                f"{p.stage:<10} {p.quantity:<28} {layer:>5} {short(p.apart)} {short(p.bound)} "
                f"{short(p.worst)} {short(p.worst_bound)} {short(p.a_off)} {short(p.b_off)}{mark}"
            )
        lines.append(self.verdict())
        return "\n".join(lines)

    def verdict(self) -> str:
        """One sentence."""
        if not self.parted:
            mute = sum(p.bound >= 1 for p in self.parts)
            less = f", of which {mute} say nothing: this type's own rounding is as large as they are" if mute else ""
            return f"{self.a} and {self.b} agree in all {len(self.parts)} quantities{less}."
        start = next(p for p in self.parts if p.parted)
        off = self.b if start.b_off >= start.a_off else self.a
        if self.first is None:
            where = start.quantity if start.layer is None else f"{start.quantity} of layer {start.layer}"
            first = f"in {start.stage} at {where}; every site of the forward agrees"
        else:
            first = f"at {self.first}"
        return f"They part first {first}. {off} is the one that is off."


def bisect(
    a: str | nn.Module,
    b: str | nn.Module,
    *,
    model: Mamba | None = None,
    length: int = 17,
    batch: int = 4,
    seed: int = 0,
) -> Bisection:
    """Compare two implementations of the same weights, quantity by quantity.

    Args:
        a, b: each a target's name, `module:function` that returns a module, or a module.
        model: the weights where neither is a module.
    Raises:
        CheckpointError: modules whose weights differ, or that are no Mamba.
        InputError: names without weights, or what cannot be imported.
    Cost: two forwards, a backward of the whole and one of every mixer, and `length` decoding steps of each, and of the
        readable model in float64 and, rounded in a few ways, in the own type.
    """
    modules = [imported(x) if isinstance(x, str) and ":" in x else x for x in (a, b)]
    live = [m for m in modules if isinstance(m, nn.Module)]
    if len(live) == 2:
        same_weights(*live)
    if live:
        model = live[0] if isinstance(live[0], Mamba) else Mamba.from_module(live[0])
    assert model is not None, "two names need weights: model="
    one, two = (_implementation(m, x, model) for m, x in zip(modules, (a, b), strict=True))
    true = reference(model)
    ids = draw_ids(model.config, batch, length, seed).to(model.device)
    seen = true.forward(ids)
    feed, inputs = of_layers("resid_pre", seen), of_layers("mixer_in", seen, model.dtype)
    everywhere = list(range(length))
    parts: list[Part] = []

    def stage(name: str, seen: Sequence[dict[Key, Tensor]]) -> list[Row]:
        found_a, found_b, want, *same = seen
        rows = compare("", name, found_b, [errors(one, want) for one in same], want, model.dtype)
        for row in rows:
            key = (row.quantity, row.layer)
            if key in found_a:
                off = relative(found_a[key], want[key])
                apart = relative(found_b[key], found_a[key])
                worst = at_worst(row.quantity, found_b[key], found_a[key])
                worst_bound = None if row.worst_bound is None else 2 * row.worst_bound
                parts.append(Part(name, *key, apart, off, row.error, 2 * row.bound, worst, worst_bound))
        return rows

    everyone: tuple[Implementation, ...] = (one, two, true, *roundings(model))
    fed = [each.forward(ids, feed=feed, at_positions=everywhere) for each in everyone]
    stage("layers", fed)
    first = first_to_part(
        [
            Row("", "layers", p.quantity, p.layer, p.apart, p.worst, None, p.bound, p.worst_bound, False)
            for p in parts
            if p.parted
        ],
        fed[1],
        fed[0],
        everywhere,
    )
    stage("mixers", [each.mixers(inputs) for each in everyone])
    stage("model", [each.forward(ids, inside=False) for each in everyone])
    stage("gradients", [each.gradients(ids) for each in everyone])
    stage("decoding", [each.decode(ids) for each in everyone])
    return Bisection(one.name, two.name, parts, first)


def _implementation(module: object, name: object, model: Mamba) -> Implementation:
    if isinstance(module, Mamba):
        made: Implementation = readable(module)
        made.name = str(name) if isinstance(name, str) else "a Mamba"
        return made
    if isinstance(module, nn.Module):
        return Theirs(module, name if isinstance(name, str) else type(module).__name__)
    return target(str(module), model)
