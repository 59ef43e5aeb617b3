"""The bounds of shortcuts against counting every prompt, and against what is known of the groups."""

from collections import Counter, defaultdict
from itertools import pairwise, product

import pytest

from analyses.hidden_reasoning.errors import TaskError
from analyses.hidden_reasoning.task import DOUBLETHINK, MASKED, OPERATIONS, Task
from analyses.hidden_reasoning.task.shortcuts import LAST, bounds, multisets, quotients

CONTROL = Task(acts="s5")
SIX = Task(6, ("one", "two", "double", "triple"))  # multiplications modulo 6 lose information


def counted(task, n, view):
    """The best accuracy of any function of what `view` tells of a prompt, by listing all prompts."""
    seen = defaultdict(Counter)
    for ops in product(range(len(task.operations)), repeat=n):
        value = task.start
        for op in ops:
            value = int(task.table[op, value])
        seen[view(ops)][value] += 1
    return sum(max(c.values()) for c in seen.values()) / len(task.operations) ** n


@pytest.mark.parametrize("task", [MASKED, CONTROL, SIX, DOUBLETHINK, Task(start=3)], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_against_counting_every_prompt(task, n):
    found = {name: share[n] for name, share in bounds(task, [n]).items()}
    assert found["length"] == pytest.approx(counted(task, n, lambda ops: None))
    assert found["multiset"] == pytest.approx(counted(task, n, lambda ops: tuple(sorted(ops))))
    for k in LAST:
        assert found[f"last {k}"] == pytest.approx(counted(task, n, lambda ops, k=k: ops[-k:]))
    factors = [OPERATIONS[name][0] for name in task.operations]

    def product_of(ops):
        made = 1
        for op in ops:
            made = made * factors[op] % task.modulus
        return made

    if task.acts == "arithmetic":
        name = "quotient of size 4" if task.invertible else "product of multipliers"
        assert found[name] == pytest.approx(counted(task, n, product_of))
    if task.name == "doublethink":
        letters = counted(task, n, lambda ops: sum(len(task.operations[op]) for op in ops) % 5)
        assert found["overt"] == pytest.approx(letters)


def test_the_quotients_are_those_of_the_groups():
    assert set(quotients(MASKED)) == {"quotient of size 4", "quotient of size 2"}  # 20 over 5, and over 10
    assert set(quotients(CONTROL)) == {"quotient of size 2"}  # S5 over A5, the sign
    one, two = (quotients(MASKED)[f"quotient of size {m}"] for m in (4, 2))
    for a in MASKED.closure:
        for b in MASKED.closure:
            factor = [(m[1] - m[0]) % 5 for m in (a, b)]
            assert (one(a) == one(b)) == (factor[0] == factor[1])
            assert (two(a) == two(b)) == (factor[0] in (factor[1], -factor[1] % 5))


def test_to_know_all_is_to_be_right_and_to_know_more_is_no_worse():
    found = bounds(MASKED, range(1, 7))
    for n in range(1, 5):
        assert found[f"last {n}"][n] == pytest.approx(1.0)
    for n in range(1, 7):
        row = [found["length"][n], *(found[f"last {k}"][n] for k in LAST)]
        assert all(a <= b + 1e-12 for a, b in pairwise(row))
        assert found["quotient of size 2"][n] <= found["quotient of size 4"][n] <= found["multiset"][n] + 1e-12


def test_long_prompts_know_little_from_few_operations():
    found = bounds(MASKED, [12])
    assert found["last 1"][12] < 0.24 and found["last 4"][12] < 0.5
    assert 0.2 < found["multiset"][12] < 0.5


def test_too_long_or_too_short_is_said():
    with pytest.raises(TaskError, match="at least one step"):
        bounds(MASKED, [0])
    with pytest.raises(TaskError, match="multisets"):
        multisets(MASKED, 40)
