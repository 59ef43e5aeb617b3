r"""The `masked` task: compute step by step, with the values between written out (`show`) or not (`hide`).

    show one triple two\n 0 one 1 triple 3 two 0
    hide one triple two\n 0 one _ triple _ two 0

A row of s steps has s + 2 words of prompt (mode, operations, newline) and 1 + 2 s words of reasoning (the value 0, then
operation and value in turn), 3 s + 3 in all; the last is the final answer. Word j of the prompt's operations is at
1 + j, its echo at s + 3 + 2 j, the value after it at s + 4 + 2 j.

Axes: `b` row, `s` step (padded with -1 beyond a row's own number), `l` position.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from minimal_mamba.errors import nearest

from .errors import TaskError
from .tokenizer import WordTokenizer

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
Seed = int | Sequence[int]
Ints = NDArray[np.int64]
ROUNDS = 1000  # how often rows of `pairs` are drawn again before it gives up


def _integer(value: object, what: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TaskError(f"{what}={value!r}: give an int.") from None


@dataclass(frozen=True)
class MaskedTask:
    """Arithmetic modulo `modulus` with a choice of operations.

    Args:
        modulus: at least 2; all values are 0..modulus-1. One that is not prime makes multiplications lose information.
        operations: at least two names from `OPERATIONS`.
    Raises:
        TaskError: an unknown or repeated operation, or two that are the same function under this modulus.
    """

    modulus: int = 5
    operations: tuple[str, ...] = field(default=tuple(OPERATIONS))

    def __post_init__(self) -> None:
        if _integer(self.modulus, "modulus") < 2:
            raise TaskError(f"modulus={self.modulus}: give at least 2.")
        object.__setattr__(self, "operations", tuple(self.operations))
        for name in self.operations:
            if name not in OPERATIONS:
                raise TaskError(f"no operation {name!r}.{nearest(name, OPERATIONS)} All: {', '.join(OPERATIONS)}.")
        if len(set(self.operations)) < max(2, len(self.operations)):
            raise TaskError(f"operations={self.operations}: give at least two, each once.")
        seen: dict[tuple[int, ...], str] = {}
        for name, row in zip(self.operations, self.table.tolist(), strict=True):
            if (other := seen.setdefault(tuple(row), name)) != name:
                raise TaskError(
                    f"modulo {self.modulus}, {other!r} and {name!r} are the same operation; give a larger modulus "
                    "or leave one of them out."
                )

    @cached_property
    def table(self) -> Ints:
        """(operations, modulus) the value after each operation on each value."""
        values = np.arange(self.modulus)
        steps = [OPERATIONS[name] for name in self.operations]
        return np.array([(factor * values + shift) % self.modulus for factor, shift in steps])

    @cached_property
    def tokenizer(self) -> WordTokenizer:
        """The tokenizer that knows the words of the task."""
        return WordTokenizer(["\n", "show", "hide", "_", *map(str, range(self.modulus)), *self.operations])

    @cached_property
    def value_ids(self) -> Tensor:
        """(modulus,) token id of each value."""
        return torch.tensor([self.tokenizer.ids[str(v)] for v in range(self.modulus)])


MASKED = MaskedTask()


@dataclass(frozen=True)
class Batch:
    """Rows of the task, right-padded; every field is a tensor whose first axis is b.

    Args:
        ids: (b, l) token ids. lengths: (b,) tokens in each row. prompt_length: (b,) tokens up to and with the newline.
        num_steps: (b,). hidden: (b,) bool. operations: (b, s) index into the task's operations. values: (b, s) value
            after each step, written or not; both -1 beyond the row's steps.
        reasoning: (b, l) True on the reasoning tokens but the final answer. answer: (b, l) True on the final answer.
    """

    ids: Tensor
    lengths: Tensor
    prompt_length: Tensor
    num_steps: Tensor
    hidden: Tensor
    operations: Tensor
    values: Tensor
    reasoning: Tensor
    answer: Tensor

    @property
    def answer_ids(self) -> Tensor:
        """(b,) token id of the final answer."""
        return self.ids.gather(1, (self.lengths - 1)[:, None])[:, 0]


@dataclass(frozen=True)
class Pairs:
    """Counterfactual pairs of hidden prompts: row i of base and donor differ in one operation.

    Args:
        base_ids, donor_ids: (b, l) all words before the final answer, so that the next token is the answer.
        base_answer, donor_answer: (b,) token id of the final answer.
        positions: (b, 2) where the ids differ: the operation in the prompt, and its echo.
        which_step: (b,) the step, from 0, whose operation differs.
        base_values, donor_values: (b, s) hidden value after each step.
    """

    base_ids: Tensor
    donor_ids: Tensor
    base_answer: Tensor
    donor_answer: Tensor
    positions: Tensor
    which_step: Tensor
    base_values: Tensor
    donor_values: Tensor


def draw(num_steps: ArrayLike, n: int, seed: Seed, *, hidden: ArrayLike = True, task: MaskedTask = MASKED) -> Batch:
    """Draw rows, operations uniform and independent.

    Args:
        num_steps: steps of each row, (b,) or one int >= 1 for all. n: number of rows b. seed: an int or ints >= 0.
        hidden: (b,) or one bool: whether the values between are not written.
    Returns:
        Batch, always the same for the same arguments.
    Raises:
        TaskError: fewer than one step or row.
    """
    steps, n = _rows(num_steps, n)
    drawn = np.random.default_rng(seed).integers(len(task.operations), size=(n, int(steps.max())))
    return compose(drawn, steps, hidden=hidden, task=task)


def compose(
    operations: ArrayLike, num_steps: ArrayLike, *, hidden: ArrayLike = True, task: MaskedTask = MASKED
) -> Batch:
    """Write rows out for given operations.

    Args:
        operations: (b, s) index into `task.operations`; what is beyond a row's steps is not read.
        num_steps, hidden: (b,) or one for all.
    Returns:
        Batch. Raises TaskError for an index that is no operation, or for fewer than one step or more than s.
    """
    given = np.asarray(operations, dtype=np.int64)
    if given.ndim != 2:
        raise TaskError(f"operations have shape {given.shape}; they are (rows, steps).")
    steps, n = _rows(num_steps, len(given))
    most = int(steps.max())
    if most > given.shape[1]:
        raise TaskError(f"num_steps={most}, but there are operations for {given.shape[1]} steps; give as many.")
    inside = np.arange(most) < steps[:, None]  # (b, s)
    chosen = np.where(inside, given[:, :most], 0)
    if chosen.min() < 0 or chosen.max() >= len(task.operations):
        raise TaskError(f"operations are indices 0..{len(task.operations) - 1}: {', '.join(task.operations)}.")
    values = run_steps(chosen, task)
    secret = np.broadcast_to(np.asarray(hidden, dtype=bool), (n,))

    words = task.tokenizer.ids
    op_id = np.array([words[name] for name in task.operations])
    value_id = task.value_ids.numpy()
    row, step = inside.nonzero()
    s = steps[row]
    ids = np.full((n, 3 * most + 3), task.tokenizer.pad_id)  # (b, l)
    ids[:, 0] = np.where(secret, words["hide"], words["show"])
    ids[row, 1 + step] = ids[row, s + 3 + 2 * step] = op_id[chosen[row, step]]
    ids[np.arange(n), steps + 1] = words["\n"]
    ids[np.arange(n), steps + 2] = value_id[0]
    masked = secret[row] & (step < s - 1)  # the final value is always written
    ids[row, s + 4 + 2 * step] = np.where(masked, words["_"], value_id[values[row, step]])

    lengths, prompt = 3 * steps + 3, steps + 2
    pos = np.arange(ids.shape[1])
    arrays = {
        "ids": ids,
        "lengths": lengths,
        "prompt_length": prompt,
        "num_steps": steps,
        "hidden": secret.copy(),
        "operations": np.where(inside, chosen, -1),
        "values": np.where(inside, values, -1),
        "reasoning": (pos >= prompt[:, None]) & (pos < lengths[:, None] - 1),
        "answer": pos == lengths[:, None] - 1,
    }
    return Batch(**{name: torch.from_numpy(a) for name, a in arrays.items()})


def run_steps(operations: Ints, task: MaskedTask = MASKED) -> Ints:
    """The value after each step: operations (b, s) -> (b, s), starting from 0."""
    values = np.empty_like(operations)
    value = np.zeros(len(operations), dtype=np.int64)
    for i in range(operations.shape[1]):
        value = values[:, i] = task.table[operations[:, i], value]
    return values


def pairs(
    num_steps: int,
    n: int,
    seed: Seed,
    *,
    which_step: int | None = None,
    same_value: bool = False,
    task: MaskedTask = MASKED,
) -> Pairs:
    """Draw pairs of hidden prompts that differ in one operation only, in the prompt and in its echo.

    Args:
        num_steps: steps of every row, >= 1. n: number of pairs. seed: an int or ints >= 0.
        which_step: the step, from 0, whose operation differs; negative counts from the end; None: drawn for each pair.
        same_value: False: the hidden value differs from that step on to the end, so the answers differ. True, the
            control: two operations that lead to the same value there, so the answers agree.
    Returns:
        Pairs, always the same for the same arguments.
    Raises:
        TaskError: a step that does not exist, or a task without such pairs.
    """
    steps, n = _rows(num_steps, n)
    s = int(steps[0])
    if which_step is not None and not -s <= _integer(which_step, "which_step") < s:
        raise TaskError(f"which_step={which_step} does not exist: there are steps 0..{s - 1}.")
    rng, k = np.random.default_rng(seed), len(task.operations)
    base, donor = np.empty((n, s), dtype=np.int64), np.empty((n, s), dtype=np.int64)
    step = np.empty(n, dtype=np.int64)
    todo = np.arange(n)
    for _ in range(ROUNDS):
        m = len(todo)
        base[todo] = donor[todo] = rng.integers(k, size=(m, s))
        step[todo] = rng.integers(s, size=m) if which_step is None else which_step % s
        donor[todo, step[todo]] = (base[todo, step[todo]] + rng.integers(1, k, size=m)) % k
        equal = run_steps(base[todo], task) == run_steps(donor[todo], task)
        after = np.arange(s) >= step[todo, None]
        todo = todo[~((equal == same_value) | ~after).all(1)]
        if not len(todo):
            break
    else:
        kind = "the same value" if same_value else "values that differ to the end"
        raise TaskError(f"found no pairs with {kind} in {ROUNDS} draws; choose another step, task or number of steps.")
    one, other = (compose(ops, s, task=task) for ops in (base, donor))
    changed = torch.from_numpy(step)
    return Pairs(
        one.ids[:, :-1], other.ids[:, :-1], one.answer_ids, other.answer_ids,
        torch.stack([1 + changed, s + 3 + 2 * changed], 1), changed, one.values, other.values,
    )  # fmt: skip


def _rows(num_steps: ArrayLike, n: int) -> tuple[Ints, int]:
    """The number of steps of each row (b,), and b; both at least 1."""
    if _integer(n, "n") < 1:
        raise TaskError(f"n={n}: draw at least one row.")
    steps = np.asarray(num_steps)
    if steps.dtype.kind not in "iu" or steps.shape not in ((), (n,)):
        raise TaskError(f"num_steps={num_steps!r}: give an int, or one for each of the {n} rows.")
    if steps.min() < 1:
        raise TaskError(f"num_steps={int(steps.min())}: a row has at least one step.")
    return np.broadcast_to(steps, (n,)).astype(np.int64), n
