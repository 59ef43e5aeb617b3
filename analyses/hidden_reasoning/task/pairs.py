"""Counterfactual pairs: two prompts that differ in one operation and are the same after it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import TaskError
from .layout import MASKED, Seed, Task, compose, rows_of
from .rules import Bools, integer

ROUNDS = 1000  # how often rows are drawn again before it gives up
WANTED = ("differ", "same")


@dataclass(frozen=True)
class Pairs:
    """Counterfactual pairs: row i of base and donor differ in one operation.

    Args:
        base_ids, donor_ids: (b, l) all words before the final answer, so that the next token is the answer.
        base_answer, donor_answer: (b,) token id of the final answer.
        positions: (b, 2) where that operation is: in the prompt, and in the reasoning; (b, 1) of `direct`.
        which_step: (b,) the step, from 0, whose operation differs.
        base_values, donor_values: (b, s) hidden value after each step. base_overt, donor_overt: (b, l) overt value at
            every position, -1 where there is none.
    """

    base_ids: Tensor
    donor_ids: Tensor
    base_answer: Tensor
    donor_answer: Tensor
    positions: Tensor
    which_step: Tensor
    base_values: Tensor
    donor_values: Tensor
    base_overt: Tensor
    donor_overt: Tensor


def pairs(
    num_steps: int,
    n: int,
    seed: Seed,
    *,
    which_step: int | None = None,
    same_value: bool = False,
    overt: str | None = None,
    task: Task = MASKED,
) -> Pairs:
    """Draw pairs of prompts that conceal their values and differ in one operation, wherever it is written.

    Args:
        num_steps: steps of every row, >= 1. n: number of pairs. seed: an int or ints >= 0.
        which_step: the step, from 0, whose operation differs; negative counts from the end; None: drawn for each pair.
        same_value: False: the hidden value differs from that step on to the end, so the answers differ. True, the
            control: two operations that lead to the same value there, so the answers agree.
        overt: of `doublethink`, "same" or "differ": whether the overt values agree, from that step on to the end; None:
            as it comes.
    Returns:
        Pairs, always the same for the same arguments.
    Raises:
        TaskError: a step that does not exist, or a task without such pairs.
    """
    steps, n = rows_of(num_steps, n)
    s = int(steps[0])
    if which_step is not None and not -s <= integer(which_step, "which_step") < s:
        raise TaskError(f"which_step={which_step} does not exist: there are steps 0..{s - 1}.")
    if overt is not None and (task.name != "doublethink" or overt not in WANTED):
        raise TaskError(f"overt={overt!r}: 'same' or 'differ', of doublethink, whose text shows another value.")
    rng, k = np.random.default_rng(seed), len(task.operations)
    base, donor = np.empty((n, s), dtype=np.int64), np.empty((n, s), dtype=np.int64)
    step = np.empty(n, dtype=np.int64)
    todo = np.arange(n)
    for _ in range(ROUNDS):
        m = len(todo)
        base[todo] = donor[todo] = rng.integers(k, size=(m, s))
        step[todo] = rng.integers(s, size=m) if which_step is None else which_step % s
        donor[todo, step[todo]] = (base[todo, step[todo]] + rng.integers(1, k, size=m)) % k
        after = np.arange(s) >= step[todo, None]
        fits = _agree(task.values(base[todo]) == task.values(donor[todo]), after, same_value)
        if overt is not None:
            letters = (task.letters[ops[todo]].cumsum(1) % task.modulus for ops in (base, donor))
            fits &= _agree(np.equal(*letters), after, overt == "same")
        todo = todo[~fits]
        if not len(todo):
            break
    else:
        kind = "the same value" if same_value else "values that differ to the end"
        kind += "" if overt is None else f" and overt values that are {overt}"
        raise TaskError(f"found no pairs with {kind} in {ROUNDS} draws; choose another step, task or number of steps.")
    one, other = (compose(ops, s, task=task) for ops in (base, donor))
    changed = torch.from_numpy(step)
    end = None if task.name == "direct" else -1
    at = {"direct": [changed], "masked": [1 + changed, s + 3 + 2 * changed],
          "doublethink": [changed, s + 1 + 2 * changed]}[task.name]  # fmt: skip
    return Pairs(
        one.ids[:, :end], other.ids[:, :end], one.answer_ids, other.answer_ids, torch.stack(at, 1), changed,
        one.values, other.values, one.overt[:, :end], other.overt[:, :end],
    )  # fmt: skip


def _agree(equal: Bools, after: Bools, wanted: bool) -> Bools:
    """(b,) whether all places after the step are equal, or all differ, as wanted."""
    found: Bools = ((equal == wanted) | ~after).all(1)
    return found
