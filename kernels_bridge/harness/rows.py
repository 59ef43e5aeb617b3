"""A row of the check: one quantity's error, the readable model's at the same type, the bound, and pass or fail."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minimal_mamba.errors import InputError
from minimal_mamba.sites import SITES

from .bounds import FACTOR, FLOOR, WORST_FACTOR
from .watch import Key


@dataclass(frozen=True)
class Row:
    """One quantity of one case.

    Args:
        error: |found - true| / |true| in norm.
        worst: |found - true| at the one position of one row where it is largest, over what |true| is at a position in
            the mean (of squares); in a parameter's gradient at the one channel, or token of the vocabulary; in the last
            state at the one channel, over what |true| is there; None for what has neither. One of many hardly counts in
            `error`.
        readable: `error` of the readable model in the target's type; None for an operation.
        bound, worst_bound: what `error` and `worst` may be.
        passed: whether they are, all numbers being finite.
        note: another rule that failed, if one did.
    """

    case: str
    kind: str
    quantity: str
    layer: int | None
    error: float
    worst: float | None
    readable: float | None
    bound: float
    worst_bound: float | None
    passed: bool
    note: str = ""

    @property
    def telling(self) -> bool:
        """Whether it says anything: zeros in the place of the quantity would be outside of its bound."""
        return self.bound < 1


COLUMNS = [field.name for field in fields(Row)][2:]


def to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The rows of one case as JSON keeps them, numbers with four digits: a third of the room of a mapping each."""

    def short(x: Any) -> Any:
        return float(f"{x:.3e}") if isinstance(x, float) else x

    return {name: [short(getattr(row, name)) for row in rows] for name in COLUMNS}


def from_columns(case: str, columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """The rows of the case of this name, which begins with its kind."""
    kind = case.partition(",")[0]
    return [Row(case, kind, *values) for values in zip(*(columns[name] for name in COLUMNS), strict=True)]


def relative(found: Tensor, true: Tensor) -> float:
    """Relative error in norm; infinite where a number is not finite."""
    gap = found.double() - true.double()
    size = float(true.double().norm()) or 1.0
    return float(gap.norm()) / size if gap.isfinite().all() else float("inf")


def by_position(found: Tensor, true: Tensor) -> Tensor:
    """The error of each position (b, l), of values (b, l, ...), over the root mean square of what is true at one.

    Positions at which nothing is, such as padding, do not count in the mean.
    """
    return _by_part(found, true, 2)


def _by_part(found: Tensor, true: Tensor, axes: int) -> Tensor:
    """`by_position`, of whatever the first axes count."""
    gap = (found.double() - true.double()).nan_to_num(nan=float("inf")).unsqueeze(-1).flatten(axes).norm(dim=axes)
    size = true.double().unsqueeze(-1).flatten(axes).norm(dim=axes)
    return gap / size[size > 0].square().mean().sqrt().nan_to_num(nan=1.0)


def _by_own_size(found: Tensor, true: Tensor) -> Tensor:
    """The error of each channel of a state (b, e, n), over its own size, or a ten-thousandth of the mean one's."""
    gap = (found.double() - true.double()).nan_to_num(nan=float("inf")).norm(dim=(0, 2))
    size = true.double().norm(dim=(0, 2))
    return gap / size.clamp(min=float(1e-4 * size.square().mean().sqrt()) or 1.0)


def at_worst(quantity: str, found: Tensor, true: Tensor) -> float | None:
    """The error at the worst position, or in the worst channel of a parameter's gradient or of the last state; None for
    what has neither."""
    if quantity.removeprefix("d ") in SITES:
        return float(by_position(found, true).max())
    if quantity == "last ssm_state":
        return float(_by_own_size(found, true).max())
    return float(_by_part(found, true, 1).max()) if quantity.startswith("d ") else None


class Unbounded(InputError):
    """The readable model in the target's type overflows, so that whatever a target gives would be within its bound."""


Errors = Mapping[Key, tuple[float, float]]  # of each quantity its relative error, and the one at its worst place, or 0


def errors(same: Mapping[Key, Tensor], true: Mapping[Key, Tensor]) -> Errors:
    """How far the readable model is from what is true."""
    return {
        key: (relative(same[key], want), at_worst(key[0], same[key], want) or 0.0)
        for key, want in true.items()
        if key in same
    }


def compare(
    case: str, kind: str, found: Mapping[Key, Tensor], same: Sequence[Errors], true: Mapping[Key, Tensor],
    dtype: torch.dtype, wide_states: bool = False,
) -> list[Row]:  # fmt: skip
    """A row for every quantity that all three give.

    `same` are the readable model's `errors`, under several roundings: the largest counts. One parameter's gradient may
    be rounded little by luck, so in a gradient the largest of its layer does. With `wide_states` the last state must
    have more bits than a 16-bit `dtype`: to round it errs less than it may, token by token.

    Raises:
        Unbounded: the readable model or `true` holds what is not finite.
    """
    rows = []
    own: dict[Key, tuple[float, float]] = {}  # the readable model's error, and its worst
    largest: dict[int | None, tuple[float, float]] = {}  # of the gradients of a layer
    for key in true:
        if key in found:
            own[key] = max(one[key][0] for one in same), max(one[key][1] for one in same)
            if not math.isfinite(own[key][0]):
                raise Unbounded(
                    f"no verdict: in {str(dtype).removeprefix('torch.')} the readable model itself gives numbers in "
                    f"{key[0]} that are not finite, which bound nothing. Check a type of more range, or other weights."
                )
            if key[0].startswith("d "):
                before = largest.get(key[1], (0.0, 0.0))
                largest[key[1]] = max(before[0], own[key][0]), max(before[1], own[key][1])
    for key, want in true.items():
        if key not in found:
            continue
        got = found[key]
        if got.shape != want.shape:
            note = f"shape {tuple(got.shape)} for {tuple(want.shape)}"
            rows.append(Row(case, kind, *key, float("inf"), None, None, 0.0, None, False, note))
            continue
        error, worst, worst_bound = relative(got, want), at_worst(key[0], got, want), None
        may, may_at_worst = largest[key[1]] if key[0].startswith("d ") else own[key]
        if key[0].removeprefix("d ") in SITES:  # at the worst of many positions no luck is had
            may_at_worst = own[key][1]
        bound = FACTOR * may + FLOOR[dtype]
        passed = error <= bound
        if worst is not None:
            worst_bound = WORST_FACTOR * may_at_worst + FLOOR[dtype]
            passed = passed and worst <= worst_bound
        note = ""
        if wide_states and key[0] == "last ssm_state" and got.any() and torch.equal(got.to(dtype).to(got), got):
            passed, note = False, f"rounded to {str(dtype).removeprefix('torch.')}"
        rows.append(Row(case, kind, *key, error, worst, may, bound, worst_bound, passed, note))
    return rows


def table(rows: Sequence[Row]) -> str:
    """One line a kind and quantity: its worst row over layers and cases, measured against its bound."""
    worst: dict[tuple[str, str], Row] = {}
    count: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row.kind, row.quantity)
        count[key] = count.get(key, 0) + 1
        if key not in worst or _strain(row) > _strain(worst[key]):
            worst[key] = row
    head = (
        f"{'kind':<11} {'quantity':<27} {'rows':>5} {'error':>8} {'readable':>8} {'bound':>8} {'worst':>8} {'bound':>8}"
        "  nearest to its bound in"
    )
    lines = [head]
    for (kind, quantity), row in worst.items():
        layer = "" if row.layer is None else f"layer {row.layer}, "
        verdict = f"FAIL {row.note}".rstrip() if not row.passed else "pass" if row.telling else "says nothing"
        lines.append(
            f"{kind:<11} {quantity:<27} {count[kind, quantity]:>5} {short(row.error)} {short(row.readable)} "
            f"{short(row.bound)} {short(row.worst)} {short(row.worst_bound)}  "
            f"{layer}{row.case.partition(', ')[2]}  {verdict}"
        )
    return "\n".join(lines)


def short(x: float | None) -> str:
    """A number as the tables print it."""
    return f"{'-':>8}" if x is None else f"{x:8.1e}"


def _strain(row: Row) -> tuple[bool, float]:
    shares = [
        x / bound if bound else float("inf")
        for x, bound in ((row.error, row.bound), (row.worst, row.worst_bound))
        if x is not None and bound is not None
    ]
    return not row.passed, max(shares)
