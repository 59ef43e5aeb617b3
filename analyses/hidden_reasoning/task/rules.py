"""What the operations do: arithmetic modulo a number, or, as the control, permutations that generate S5."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from minimal_mamba.errors import nearest

from ..errors import TaskError

# an operation is value -> factor * value + shift
OPERATIONS: dict[str, tuple[int, int]] = {
    "one": (1, 1),
    "two": (1, 2),
    "three": (1, 3),
    "four": (1, 4),
    "double": (2, 0),
    "triple": (3, 0),
    "quad": (4, 0),
}
# The control: each word has the cycle type that it has modulo 5, and three of them act otherwise, so that all together
# generate S5, which is not solvable, instead of the affine group, which is.
PERMUTATIONS: dict[str, tuple[int, ...]] = {
    "one": (1, 2, 3, 4, 0),
    "two": (2, 3, 4, 0, 1),
    "three": (3, 4, 0, 1, 2),
    "four": (4, 0, 1, 2, 3),
    "double": (0, 2, 3, 4, 1),
    "triple": (0, 4, 1, 2, 3),
    "quad": (0, 3, 4, 1, 2),
}
ACTS = ("arithmetic", "s5")
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Map = tuple[int, ...]  # what a word, or several in a row, make of each value


def integer(value: object, what: str) -> int:
    """The int that is meant; raises TaskError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TaskError(f"{what}={value!r}: give an int.") from None


@dataclass(frozen=True)
class Rules:
    """A value, and the words that act on it.

    Args:
        modulus: at least 2; all values are 0..modulus-1. One that is not prime makes multiplications lose information.
        operations: at least two names from `OPERATIONS`. start: the value before the first.
        acts: "arithmetic" modulo `modulus`; "s5", the control: the same words as permutations of five values.
    Raises:
        TaskError: an unknown or repeated operation, or two that are the same function under this modulus.
    """

    modulus: int = 5
    operations: tuple[str, ...] = field(default=tuple(OPERATIONS))
    start: int = 0
    acts: str = "arithmetic"

    def __post_init__(self) -> None:
        if integer(self.modulus, "modulus") < 2:
            raise TaskError(f"modulus={self.modulus}: give at least 2.")
        if not 0 <= integer(self.start, "start") < self.modulus:
            raise TaskError(f"start={self.start}: values are 0..{self.modulus - 1}.")
        if self.acts not in ACTS:
            raise TaskError(f"acts={self.acts!r}: there are {', '.join(ACTS)}.")
        if self.acts == "s5" and self.modulus != 5:
            raise TaskError(f"modulus={self.modulus}: S5 acts on five values; give 5.")
        object.__setattr__(self, "operations", tuple(self.operations))
        for name in self.operations:
            if name not in OPERATIONS:
                raise TaskError(f"no operation {name!r}.{nearest(name, OPERATIONS)} All: {', '.join(OPERATIONS)}.")
        if len(set(self.operations)) < max(2, len(self.operations)):
            raise TaskError(f"operations={self.operations}: give at least two, each once.")
        seen: dict[Map, str] = {}
        for name, row in zip(self.operations, self.table.tolist(), strict=True):
            if (other := seen.setdefault(tuple(row), name)) != name:
                raise TaskError(
                    f"modulo {self.modulus}, {other!r} and {name!r} are the same operation; give a larger modulus "
                    "or leave one of them out."
                )

    @cached_property
    def table(self) -> Ints:
        """(operations, modulus) the value after each operation on each value."""
        if self.acts == "s5":
            return np.array([PERMUTATIONS[name] for name in self.operations])
        values = np.arange(self.modulus)
        steps = [OPERATIONS[name] for name in self.operations]
        return np.array([(factor * values + shift) % self.modulus for factor, shift in steps])

    @cached_property
    def letters(self) -> Ints:
        """(operations,) how far each name moves the overt value of `doublethink`: its letters, modulo `modulus`."""
        return np.array([len(name) % self.modulus for name in self.operations])

    def values(self, operations: Ints) -> Ints:
        """The value after each step: indices of operations (b, s) -> (b, s)."""
        found = np.empty_like(operations)
        value = np.full(len(operations), self.start)
        for i in range(operations.shape[1]):
            value = found[:, i] = self.table[operations[:, i], value]
        return found

    @property
    def maps(self) -> list[Map]:
        """What each word does, as a map of all values."""
        return [tuple(row) for row in self.table.tolist()]

    @cached_property
    def closure(self) -> tuple[Map, ...]:
        """All that words in a row can do, doing nothing included: the group that they generate, or a monoid."""
        found = {tuple(range(self.modulus)): None}
        for map_ in _growing(found):
            found.update({then(map_, word): None for word in self.maps})
        return tuple(found)

    @cached_property
    def invertible(self) -> bool:
        """Whether every word is a permutation, so that the closure is a group."""
        return all(len(set(map_)) == self.modulus for map_ in self.maps)


def then(first: Map, second: Map) -> Map:
    """One map after the other."""
    return tuple(second[v] for v in first)


def _growing(found: dict[Map, None]) -> Iterator[Map]:
    """Every key, those that are added on the way included."""
    seen = 0
    while seen < len(found):
        new = list(found)[seen:]
        seen = len(found)
        yield from new
