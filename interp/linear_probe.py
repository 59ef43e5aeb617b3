"""What a probe found: its scores and controls, its directions, and the tensors that it is saved as."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from minimal_mamba.errors import InputError

from .probe_rows import read_features

CONTROL = "control/"  # before the name of a control, where a probe is saved


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """What a probe found. `weights`, `patterns` and `basis` are fitted on all rows, in the site's own coordinates.

    Args:
        score: held-out accuracy of classes; R^2 of numbers, 1 - sum (y - guess)^2 / sum (y - mean)^2, the mean that of
            the training rows.
        interval: 95 %: Wilson's, with each group counted once (of unequal ones as many as they are worth); of R^2,
            percentiles of a bootstrap over groups, of few groups too narrow (92 % with 20, 83 % with 5). Neither covers
            how another training set would have come out.
        chance: the share of the commonest class; 0 of numbers.
        controls: name -> one score a seed. Of numbers in few rows they can be far below 0: what is fitted to nothing
            misses by more than the mean does.
        classes: labels in the order of `weights`; None of numbers.
        predicted: (rows,) held-out: indices into `classes`, or numbers. fold: (rows,) the fold that held each row out.
        weights: (classes, *features), or (1, *features) of two classes and of numbers; bias likewise.
        patterns: (classes, *features) each class's mean less the mean of all rows; of numbers (1, *features), what x
            moves by, on average, for one unit. The weights are what the probe reads, not what a class is. `towards`
            makes of them what to `Add`.
        basis: (m, *features) orthonormal, the space that the probe reads, for `Project`; m is classes - 1, or 1. To
            remove it blinds this probe, not every other: classes stay apart along what their means differ by. To erase
            a label, remove the span of all `patterns` but one, after which no linear probe tells the classes apart
            (Belrose et al. 2023, arXiv:2306.03819, theorem 3.1).
        dims: principal components used. rows, groups: how many.
    """

    score: float
    interval: tuple[float, float]
    chance: float
    controls: Mapping[str, tuple[float, ...]]
    classes: tuple[Any, ...] | None
    predicted: Tensor = field(repr=False)
    fold: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    patterns: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)
    dims: int
    rows: int
    groups: int

    def towards(self, to: Any, frm: Any = None) -> Tensor:
        """What to `Add` at the site to bring a label about: along the patterns, not the weights.

        Of classes, the mean of class `to` less that of class `frm`: patterns[to] alone leads there from the mean of all
        rows, and from another class about as far as the boundary. Of numbers, what moves the reading by exactly
        to - frm, so that `towards(1.0)` is one unit. One unit of `patterns` moves it by less: by the slope of the
        readings on the labels, which of least squares is R^2 on the rows of the fit.

        Args:
            to, frm: two of `classes`, where frm may be left out if there are no others; or two numbers, frm 0 if None.
        Returns:
            (*features).
        Raises:
            InputError: no such class, or a probe whose reading nothing moves.
        """
        if self.classes is None:
            reading = float((self.weights * self.patterns).sum())
            if reading <= 0:
                raise InputError("the probe reads the same number off every row: there is no direction that moves it.")
            return (to - (0.0 if frm is None else frm)) / reading * self.patterns[0]
        if frm is None and len(self.classes) == 2 and to in self.classes:
            frm = self.classes[1 - self.classes.index(to)]
        if to not in self.classes or frm not in self.classes:
            raise InputError(f"from {frm!r} to {to!r}: name two of the classes {self.classes}.")
        return self.patterns[self.classes.index(to)] - self.patterns[self.classes.index(frm)]

    @property
    def selectivity(self) -> float:
        """Score less the mean of the shuffled labels', each of numbers counted as 0 at least, which a constant has."""
        if "shuffled" not in self.controls:
            raise InputError("selectivity needs the control 'shuffled'; this probe was made with seeds=0.")
        least = 0.0 if self.classes is None else -float("inf")
        chance = [max(least, score) for score in self.controls["shuffled"]]
        return self.score - sum(chance) / len(chance)

    def scores(self, features: Any) -> Tensor:
        """x w + b: (rows, classes), or (rows, 1), of rows like those that it was fitted on."""
        x = read_features("features", features).flatten(1)
        return x @ self.weights.flatten(1).T + self.bias

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file, of a probe whose classes are no strings; `from_tensors` reads it."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "controls"}
        found |= {f"{CONTROL}{i} {name}": scores for i, (name, scores) in enumerate(self.controls.items())}
        return {name: _tensor(value) for name, value in found.items() if value is not None}

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> "LinearProbe":
        """The probe that `tensors` wrote."""
        plain = {k: tuple(v.tolist()) if v.dim() else v.item() for k, v in found.items() if k not in TENSORS}
        controls = {k.split(" ")[1]: plain.pop(k) for k in sorted(plain) if k.startswith(CONTROL)}
        kept = {k: v for k, v in found.items() if k in TENSORS}
        return cls(**{"classes": None, **plain, **kept}, controls=controls)  # type: ignore[arg-type]


TENSORS = tuple(f.name for f in fields(LinearProbe) if f.type is Tensor)


def _tensor(value: Any) -> Tensor:
    """Of Python's numbers float64, int64 or bool."""
    made = torch.as_tensor(value)
    return (
        made
        if isinstance(value, Tensor) or not made.is_floating_point()
        else made.new_tensor(value, dtype=torch.float64)
    )
