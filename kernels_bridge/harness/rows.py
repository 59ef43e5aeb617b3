"""A row of the check: one quantity's error, the readable model's at the same type, the bound, and pass or fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import FACTOR, FLOOR
from .watch import Key


@dataclass(frozen=True)
class Row:
    """One quantity of one case.

    Args:
        error: |found - true| / |true| in norm. largest: the largest absolute error.
        readable: the same relative error of the readable model in the target's type; None for an operation.
        bound: what `error` may be. passed: whether it is, all numbers being finite.
        note: another rule that failed, if one did.
    """

    case: str
    kind: str
    quantity: str
    layer: int | None
    error: float
    largest: float
    readable: float | None
    bound: float
    passed: bool
    note: str = ""


def relative(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Relative error in norm, and the largest absolute one; infinite where a number is not finite."""
    gap = (found.double() - true.double()).abs()
    if not gap.isfinite().all():
        return float("inf"), float("inf")
    size = float(true.double().norm())
    return (float(gap.norm()) / size if size else float(gap.norm())), (float(gap.max()) if gap.numel() else 0.0)


def compare(
    case: str, kind: str, found: Mapping[Key, Tensor], same: Sequence[Mapping[Key, Tensor]], true: Mapping[Key, Tensor],
    dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    """A row for every quantity that all three give.

    `same` are the readable model's, under several roundings: the largest error counts. One parameter's gradient may be
    rounded little by luck, so in a gradient the largest of its layer does.
    """
    rows = []
    own_of = {key: max(relative(one[key], want)[0] for one in same) for key, want in true.items() if key in found}
    worst: dict[int | None, float] = {}
    for (quantity, layer), own in own_of.items():
        if quantity.startswith("d "):
            worst[layer] = max(own, worst.get(layer, 0.0))
    for key, want in true.items():
        if key not in found:
            continue
        got = found[key]
        if got.shape != want.shape:
            rows.append(Row(case, kind, *key, float("inf"), float("inf"), None, 0.0, False,
                            f"shape {tuple(got.shape)} for {tuple(want.shape)}"))  # fmt: skip
            continue
        error, largest = relative(got, want)
        own = worst[key[1]] if key[0].startswith("d ") else own_of[key]
        bound = FACTOR * own + FLOOR[dtype]
        rows.append(Row(case, kind, *key, error, largest, own, bound, error <= bound))
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
        f"{'kind':<11} {'quantity':<22} {'rows':>5} {'error':>8} {'largest':>8} {'readable':>8} {'bound':>8}  worst in"
    )
    lines = [head]
    for (kind, quantity), row in worst.items():
        own = "-" if row.readable is None else f"{row.readable:.1e}"
        layer = "" if row.layer is None else f"layer {row.layer}, "
        verdict = "pass" if row.passed else f"FAIL {row.note}".rstrip()
        lines.append(
            f"{kind:<11} {quantity:<22} {count[kind, quantity]:>5} {row.error:>8.1e} {row.largest:>8.1e} {own:>8} "
            f"{row.bound:>8.1e}  {layer}{row.case.partition(', ')[2]}  {verdict}"
        )
    return "\n".join(lines)


def _strain(row: Row) -> tuple[bool, float]:
    return not row.passed, row.error / row.bound if row.bound else float("inf")
