"""The tasks: how operations become text, and what is hidden and overt at every position of it.

direct        one triple two                             labels at the operations: 1, 3, 0
masked        show one triple two ↵ 0 one 1 triple 3 two 0
              hide one triple two ↵ 0 one _ triple _ two 0
doublethink   one triple two ↵ one 3 triple 4 two 2 ↵ 0   overt: the letters of the names so far; then the hidden value

Batches are drawn by a seed and are plain tensors. A prompt of `HELD_OUT_FROM` steps or more whose hash says so is kept
for evaluation and never trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from minimal_mamba.errors import nearest

from ..errors import TaskError
from .rules import Bools, Ints, Rules, integer
from .spelling import Spelling, spell
from .tokenizer import Tokenizer, WordTokenizer

NAMES = ("direct", "masked", "doublethink")
Seed = int | Sequence[int]
HELD_OUT_FROM = 4  # steps; of the shorter prompts there are too few to keep any apart
HELD_OUT = 10  # one of so many
NONE = -100  # a target that no loss is taken of, as in torch and transformers
PROMPTS = ("any", "train", "held out")


@dataclass(frozen=True)
class Task(Rules):
    """A way of writing down what the rules make of a value.

    Args:
        name: "direct", "masked" or "doublethink"; the others are those of `Rules`.
    Raises:
        TaskError: an unknown name, and what `Rules` raises.
    """

    name: str = "masked"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise TaskError(f"no task {self.name!r}.{nearest(self.name, NAMES)} There are {', '.join(NAMES)}.")
        super().__post_init__()

    @cached_property
    def tokenizer(self) -> WordTokenizer:
        """The small tokenizer that knows the words of all tasks with these rules."""
        return WordTokenizer(["\n", "show", "hide", "_", *map(str, range(self.modulus)), *self.operations])

    @cached_property
    def spelling(self) -> Spelling:
        """The ids of the task's words under that tokenizer."""
        return spell(self, self.tokenizer)

    @cached_property
    def value_ids(self) -> Tensor:
        """(modulus,) token id of each value under that tokenizer."""
        return torch.from_numpy(self.spelling.value)

    def tokens(self, num_steps: int) -> int:
        """How many tokens a row of so many steps has."""
        return num_steps if self.name == "direct" else 3 * num_steps + 3


MASKED = Task()
DOUBLETHINK = Task(name="doublethink")
DIRECT = Task(name="direct")


@dataclass(frozen=True)
class Batch:
    """Rows of a task, right-padded; every field is a tensor whose first axis is b.

    Args:
        ids: (b, l) token ids. lengths: (b,) tokens in each row.
        prompt_length: (b,) tokens up to and with the newline; of `direct`, all.
        num_steps: (b,). concealed: (b,) bool: whether the row's text leaves the values between out.
        operations: (b, s) index into the task's operations. values: (b, s) hidden value after each step, written or
            not; both -1 beyond the row's steps.
        hidden: (b, l) the hidden value at every position: after the operations named so far in the prompt, or in the
            reasoning, which begins anew. overt: (b, l) the value that the text has come to there: of `doublethink` the
            letters so far; of a shown row the hidden value; -1 where there is none. Both -1 on padding.
        targets: (b, l) the token that the logits of a position should give: the next one, of `direct` the hidden value;
            -100 where there is none.
        reasoning, answer: (b, l) True at the positions whose targets are the reasoning but the final answer, and that.
    """

    ids: Tensor
    lengths: Tensor
    prompt_length: Tensor
    num_steps: Tensor
    concealed: Tensor
    operations: Tensor
    values: Tensor
    hidden: Tensor
    overt: Tensor
    targets: Tensor
    reasoning: Tensor
    answer: Tensor

    @property
    def answer_ids(self) -> Tensor:
        """(b,) token id of the final answer."""
        return self.targets.gather(1, self.answer_at[:, None])[:, 0]

    @property
    def answer_at(self) -> Tensor:
        """(b,) the position whose logits give the final answer."""
        return self.answer.long().argmax(1)


def draw(
    num_steps: ArrayLike,
    n: int,
    seed: Seed,
    *,
    concealed: ArrayLike = True,
    prompts: str = "any",
    task: Task = MASKED,
    tokenizer: Tokenizer | None = None,
) -> Batch:
    """Draw rows, operations uniform and independent.

    Args:
        num_steps: steps of each row, (b,) or one int >= 1 for all. n: number of rows b. seed: an int or ints >= 0.
        concealed: (b,) or one bool: whether `masked` leaves the values between out. Other tasks always do.
        prompts: "any"; "train", all but those held out; "held out", those alone (where rows have `HELD_OUT_FROM` steps
            or more; of shorter ones any).
        tokenizer: None: the task's own.
    Returns:
        Batch, always the same for the same arguments.
    Raises:
        TaskError: fewer than one step or row. TokenizerError: a tokenizer that splits words.
    """
    if prompts not in PROMPTS:
        raise TaskError(f"prompts={prompts!r}: there are {', '.join(PROMPTS)}.")
    steps, n = rows_of(num_steps, n)
    rng, k, most = np.random.default_rng(seed), len(task.operations), int(steps.max())
    drawn = rng.integers(k, size=(n, most))
    if prompts != "any":
        todo = np.arange(n)
        while True:
            wrong = held_out(drawn[todo], steps[todo]) != (prompts == "held out")
            todo = todo[wrong & ((steps[todo] >= HELD_OUT_FROM) | (prompts == "train"))]
            if not len(todo):
                break
            drawn[todo] = rng.integers(k, size=(len(todo), most))
    return compose(drawn, steps, concealed=concealed, task=task, tokenizer=tokenizer)


def held_out(operations: Ints, steps: Ints) -> Bools:
    """(b,) whether a prompt, the first `steps` of `operations` (b, s), is kept for evaluation; its hash decides."""
    code = np.full(len(operations), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for i in range(operations.shape[1]):
        mixed = (code ^ (operations[:, i].astype(np.uint64) + np.uint64(1))) * np.uint64(0xBF58476D1CE4E5B9)
        code = np.where(i < steps, mixed ^ (mixed >> np.uint64(29)), code)
    return (steps >= HELD_OUT_FROM) & (code % np.uint64(HELD_OUT) == 0)


def compose(
    operations: ArrayLike,
    num_steps: ArrayLike,
    *,
    concealed: ArrayLike = True,
    task: Task = MASKED,
    tokenizer: Tokenizer | None = None,
) -> Batch:
    """Write rows out for given operations.

    Args:
        operations: (b, s) index into `task.operations`; what is beyond a row's steps is not read.
        num_steps, concealed: (b,) or one for all. tokenizer: None: the task's own.
    Returns:
        Batch. Raises TaskError for an index that is no operation, or for fewer than one step or more than s.
    """
    given = np.asarray(operations, dtype=np.int64)
    if given.ndim != 2:
        raise TaskError(f"operations have shape {given.shape}; they are (rows, steps).")
    steps, n = rows_of(num_steps, len(given))
    most = int(steps.max())
    if most > given.shape[1]:
        raise TaskError(f"num_steps={most}, but there are operations for {given.shape[1]} steps; give as many.")
    inside = np.arange(most) < steps[:, None]  # (b, s)
    chosen = np.where(inside, given[:, :most], 0)
    if chosen.min() < 0 or chosen.max() >= len(task.operations):
        raise TaskError(f"operations are indices 0..{len(task.operations) - 1}: {', '.join(task.operations)}.")
    secret = np.broadcast_to(np.asarray(concealed, dtype=bool), (n,)) if task.name == "masked" else np.ones(n, bool)
    spelling = task.spelling if tokenizer is None else spell(task, tokenizer)
    rows = _Rows(task, spelling, chosen, steps, inside, secret)
    {"direct": _direct, "masked": _masked, "doublethink": _doublethink}[task.name](rows)

    pos = np.arange(rows.ids.shape[1])
    if task.name != "direct":
        rows.targets[:, :-1] = np.where(pos[1:] < rows.lengths[:, None], rows.ids[:, 1:], NONE)
    prompt = rows.prompt[:, None]
    last = pos == (rows.lengths - (1 if task.name == "direct" else 2))[:, None]
    reasoning = (rows.targets != NONE) & (pos >= (0 if task.name == "direct" else prompt - 1)) & ~last
    arrays = {
        "ids": rows.ids,
        "lengths": rows.lengths,
        "prompt_length": rows.prompt,
        "num_steps": steps,
        "concealed": secret.copy(),
        "operations": np.where(inside, chosen, -1),
        "values": np.where(inside, rows.values, -1),
        "hidden": rows.hidden,
        "overt": rows.overt,
        "targets": rows.targets,
        "reasoning": reasoning,
        "answer": last,
    }
    return Batch(**{name: torch.from_numpy(a) for name, a in arrays.items()})


class _Rows:
    """Rows that are being written: `put` writes a word of each step, `once` one a row."""

    def __init__(self, task: Task, spelling: Spelling, chosen: Ints, steps: Ints, inside: Bools, secret: Bools):
        self.task, self.spelling, self.steps, self.secret = task, spelling, steps, secret
        n, width = len(steps), task.tokens(int(steps.max()))
        self.all = np.arange(n)
        self.row, self.step = inside.nonzero()
        self.s = steps[self.row]
        self.values = task.values(chosen)
        self.letters = np.cumsum(task.letters[chosen], 1) % task.modulus
        self.op, self.value, self.letter = (x[self.row, self.step] for x in (chosen, self.values, self.letters))
        self.ids = np.full((n, width), spelling.pad)  # (b, l)
        self.hidden, self.overt = np.full((n, width), -1), np.full((n, width), -1)
        self.targets = np.full((n, width), NONE)
        self.lengths, self.prompt = steps.copy(), steps.copy()

    def put(self, at: Ints, ids: Ints, overt: Ints | int = -1) -> None:
        """A word of every step, and the values there."""
        self.ids[self.row, at], self.hidden[self.row, at], self.overt[self.row, at] = ids, self.value, overt

    def once(self, at: Ints | int, ids: Ints | int, hidden: Ints | int, overt: Ints | int = -1) -> None:
        """A word of every row, and the values there."""
        self.ids[self.all, at], self.hidden[self.all, at], self.overt[self.all, at] = ids, hidden, overt

    @property
    def final(self) -> Ints:
        """(b,) the last hidden value of each row."""
        found: Ints = self.values[self.all, self.steps - 1]
        return found


def _direct(r: _Rows) -> None:
    r.put(r.step, r.spelling.operation[r.op])
    r.targets[r.row, r.step] = r.spelling.value[r.value]


def _masked(r: _Rows) -> None:
    words, start = r.spelling, r.task.start
    secret = r.secret[r.row]
    shown = np.where(secret, -1, r.value)
    blank = secret & (r.step < r.s - 1)  # the final value is always written
    r.once(0, np.where(r.secret, words.hide, words.show), start, np.where(r.secret, -1, start))
    r.put(1 + r.step, words.operation[r.op], shown)
    r.once(r.steps + 1, words.newline, r.final, np.where(r.secret, -1, r.final))
    r.once(r.steps + 2, words.first[start], start, start)
    r.put(r.s + 3 + 2 * r.step, words.operation[r.op], shown)
    r.put(r.s + 4 + 2 * r.step, np.where(blank, words.blank, words.value[r.value]), np.where(blank, -1, r.value))
    r.lengths, r.prompt = 3 * r.steps + 3, r.steps + 2


def _doublethink(r: _Rows) -> None:
    words, last = r.spelling, r.letters[r.all, r.steps - 1]
    r.put(r.step, words.operation[r.op], r.letter)
    r.once(r.steps, words.newline, r.final, last)
    r.put(r.s + 1 + 2 * r.step, words.operation[r.op], r.letter)
    r.put(r.s + 2 + 2 * r.step, words.value[r.letter], r.letter)
    r.once(3 * r.steps + 1, words.newline, r.final, last)
    r.once(3 * r.steps + 2, words.value[r.final], r.final, last)
    r.lengths, r.prompt = 3 * r.steps + 3, r.steps + 1


def text(task: Task, names: Sequence[str], concealed: bool = True) -> str:
    """One row as text, of operations by their names."""
    value, letters, words = task.start, 0, []
    for i, name in enumerate(names):
        value = int(task.table[task.operations.index(name), value])
        letters = (letters + len(name)) % task.modulus
        hide = task.name == "masked" and concealed and i < len(names) - 1
        words += [name, str(letters) if task.name == "doublethink" else "_" if hide else str(value)]
    prompt = " ".join(names)
    if task.name == "direct":
        return f" {prompt}"
    if task.name == "doublethink":
        return f" {prompt}\n {' '.join(words)}\n {value}"
    return f"{'hide' if concealed else 'show'} {prompt}\n{task.start} {' '.join(words)}"


def rows_of(num_steps: ArrayLike, n: int) -> tuple[Ints, int]:
    """The number of steps of each row (b,), and b; both at least 1."""
    if integer(n, "n") < 1:
        raise TaskError(f"n={n}: draw at least one row.")
    steps = np.asarray(num_steps)
    if steps.dtype.kind not in "iu" or steps.shape not in ((), (n,)):
        raise TaskError(f"num_steps={num_steps!r}: give an int, or one for each of the {n} rows.")
    if steps.min() < 1:
        raise TaskError(f"num_steps={int(steps.min())}: a row has at least one step.")
    return np.broadcast_to(steps, (n,)).astype(np.int64), n
