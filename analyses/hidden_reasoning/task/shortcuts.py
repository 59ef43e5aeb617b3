"""What a model could reach without following the operations one by one, computed exactly.

Each shortcut is something that it might know of a prompt. The best accuracy of any function of it is the mean, over
what it can be, of the likeliest final value's probability, with operations uniform and independent; nothing is sampled.

To stay below the best shortcut says that a model may use no more than that. To be above all of them does not prove a
computation step by step: the sum of b_i times the product of the a_j after it, modulo 5, is shallow and parallel. The
affine group that the arithmetic generates is solvable, and a fixed number of layers can compute its products
(Barrington 1989; Liu et al. 2023, arXiv:2210.10749); S5, the control, is not, and needs depth that grows with the
length unless NC1 = TC0 (Merrill et al. 2024, arXiv:2404.08819). Nor can a recurrence that is linear with positive
decays, as Mamba's is, count modulo anything by itself (Grazzi et al. 2025, arXiv:2411.12537).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TaskError
from .layout import Task, rows_of
from .rules import Map, then

Floats = NDArray[np.float64]
LAST = (1, 2, 3, 4)  # operations that a shortcut of the last ones knows
LISTED = 2_000_000  # multisets of operations, the most that are listed


def bounds(task: Task, lengths: Iterable[int]) -> dict[str, dict[int, float]]:
    """The best accuracy that each shortcut allows: name -> length -> 0..1.

    The names: "length" (nothing but it), "last k", "multiset" (which operations, in any order); where the operations
    are permutations "last 4, and multiset before", of the last four in order what they do is known; and of each proper
    quotient of what the operations generate "quotient of size m", such as the product of the multipliers, m = 4 modulo
    5. Where the operations are no permutations the product alone is taken, "product of multipliers"; of `doublethink`
    also "overt", the overt value.

    Raises:
        TaskError: a length below 1, or so long that its multisets cannot be listed.
    """
    found: dict[str, dict[int, float]] = {}
    lengths = list(lengths)
    for n in lengths:
        rows_of(n, 1)
    unordered = multisets(task, max(lengths))
    for n in lengths:
        found.setdefault("length", {})[n] = float(_values(task, n).max())
        for k in LAST:
            found.setdefault(f"last {k}", {})[n] = last(task, n, k)
        found.setdefault("multiset", {})[n] = unordered[n - 1]
        if task.invertible:
            found.setdefault(f"last {LAST[-1]}, and multiset before", {})[n] = ([1.0] * LAST[-1] + unordered)[n - 1]
        for name, label in quotients(task).items():
            found.setdefault(name, {})[n] = known(task, n, label)
        if task.name == "doublethink":
            found.setdefault("overt", {})[n] = overt(task, n)
    return found


def _values(task: Task, n: int) -> Floats:
    """(modulus,) the probability of each value after n operations."""
    p = np.eye(task.modulus)[task.start]
    for _ in range(n):
        p = np.array([np.bincount(row, weights=p, minlength=task.modulus) for row in task.table]).mean(0)
    return p


def _maps(task: Task, n: int) -> dict[Map, float]:
    """The probability of each map that n operations in a row can make."""
    share: dict[Map, float] = {tuple(range(task.modulus)): 1.0}
    for _ in range(n):
        after: dict[Map, float] = defaultdict(float)
        for map_, p in share.items():
            for word in task.maps:
                after[then(map_, word)] += p / len(task.maps)
        share = after
    return share


def last(task: Task, n: int, k: int) -> float:
    """Of functions of the last k operations: what they do to the value before them is all that counts of them."""
    k = min(k, n)
    before = _values(task, n - k)
    best = 0.0
    for map_, p in _maps(task, k).items():
        best += p * np.bincount(map_, weights=before, minlength=task.modulus).max()
    return float(best)


def known(task: Task, n: int, label: Callable[[Map], Hashable]) -> float:
    """Of functions of what a label tells of the map that all operations make together."""
    share: dict[Hashable, Any] = defaultdict(lambda: np.zeros(task.modulus))
    for map_, p in _maps(task, n).items():
        share[label(map_)][map_[task.start]] += p
    return float(sum(p.max() for p in share.values()))


def multisets(task: Task, longest: int) -> list[float]:
    """Of functions of which operations there are and how often, their order unknown: of each length from 1 on.

    Raises:
        TaskError: more than `LISTED` multisets.
    """
    k, found = len(task.operations), []
    if (count := comb(longest + k - 1, k - 1)) > LISTED:
        raise TaskError(f"{longest} steps have {count:,} multisets of operations, too many to list; give fewer steps.")
    # how many orders of each multiset lead to each value: the last operation of the order is one of its operations
    ways: dict[tuple[int, ...], Floats] = {(0,) * k: np.eye(task.modulus)[task.start]}
    for n in range(1, longest + 1):
        after: dict[tuple[int, ...], Floats] = {}
        for held, orders in ways.items():
            for op, row in enumerate(task.table):
                more = (*held[:op], held[op] + 1, *held[op + 1 :])
                moved = np.bincount(row, weights=orders, minlength=task.modulus).astype(np.float64)
                after[more] = after[more] + moved if more in after else moved
        ways = after
        found.append(float(sum(orders.max() for orders in ways.values()) / k**n))
    return found


def overt(task: Task, n: int) -> float:
    """Of functions of the overt value at the end."""
    joint = np.zeros((task.modulus, task.modulus))  # (overt, hidden)
    joint[0, task.start] = 1.0
    for _ in range(n):
        after = np.zeros_like(joint)
        for letters, row in zip(task.letters, task.table, strict=True):
            moved = np.array([np.bincount(row, weights=p, minlength=task.modulus) for p in joint])
            after += np.roll(moved, letters, 0) / len(task.table)
        joint = after
    return float(joint.max(1).sum())


@cache
def quotients(task: Task) -> dict[str, Callable[[Map], Hashable]]:
    """The proper quotients of the group that the operations generate, each as the label of a map's coset.

    They come from its normal subgroups but the trivial one and itself. Where the operations are no permutations: the
    product of the multipliers, of arithmetic.
    """
    if not task.invertible:
        m = task.modulus
        return {"product of multipliers": lambda map_: (map_[1] - map_[0]) % m}
    group = task.closure
    found: dict[str, Callable[[Map], Hashable]] = {}
    for normal in _normal_subgroups(group):
        if 1 < len(normal) < len(group):
            cosets = {map_: min(then(h, map_) for h in normal) for map_ in group}
            found[f"quotient of size {len(group) // len(normal)}"] = cosets.__getitem__
    return found


def _normal_subgroups(group: tuple[Map, ...]) -> list[frozenset[Map]]:
    """All of them: what one conjugacy class generates, and what those generate together."""
    inverse = {map_: tuple(sorted(range(len(map_)), key=map_.__getitem__)) for map_ in group}
    classes = {frozenset(then(then(inverse[g], x), g) for g in group) for x in group}

    def generated(elements: frozenset[Map]) -> frozenset[Map]:
        found, new = {group[0]}, {group[0]}
        while new:
            new = {then(a, b) for a in new for b in elements} - found
            found |= new
        return frozenset(found)

    single = {generated(elements) for elements in classes}
    every = set(single)
    while True:
        joined = {generated(a | b) for a in every for b in single} - every
        if not joined:
            return sorted(every, key=len)
        every |= joined
