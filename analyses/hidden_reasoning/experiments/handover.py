"""What a hand-over carries: the running value, or something that was worked out from the prompt.

Two prompts of the same length are drawn apart. At some word of the reasoning, a memory of the donor's run, of every
layer, takes the place of the base's, and the base's words go on. Three accounts of what the memory holds foretell the
answer:

    running value   what the base's remaining operations make of the donor's value at that word
    done            the donor's own final answer: worked out from the prompt, or what remains is read from there
    partial sum     of arithmetic: each step adds its shift times the product of the multipliers after it, known from
                    the prompt; the donor's sum so far, and the base's later terms

The whole memory put in is the run on a spliced text, the donor's words and then the base's: a model that remembers the
operations, and works the value out at the end, would answer the same. One memory alone put in is no such run. And what
a memory holds of the operations goes where it is averaged over many prompts that led to one value: the *mean* memory of
a value, put in, leaves right what needs the value alone.

Handed over from another step of the donor's than the base has come to, which splices a text that leaves operations out
or repeats some, a value that is kept in the same form at every step would be taken up too ("shifted"); one whose form
depends on the step would not.

The base's own answer means that nothing was carried. Two accounts agree by chance in one prompt of `modulus`, so each
is counted where it stands alone among the four.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp import Address, Set, at, run
from minimal_mamba import Mamba

from ..task import OPERATIONS, Batch, Task, draw
from ..task.rules import Ints
from .accuracy import wilson

STREAM = 4  # keeps the seeds of these prompts apart from those of training, evaluation and pairs
SITES = ("recurrent_state", "ssm_state", "conv_state")


def go_on(value: Ints, operations: Ints, step: int, task: Task) -> Ints:
    """(b,) the final value from a value after `step` operations."""
    for i in range(step, operations.shape[1]):
        value = task.table[operations[:, i], value]
    return value


def accounts(base: Ints, donor: Ints, step: int, task: Task) -> dict[str, Ints]:
    """The final value (b,) that each account foretells for a hand-over after `step` operations, 1 to s."""
    others, m = task.values(donor), task.modulus
    value = go_on(others[:, step - 1], base, step, task)
    found = {"base": task.values(base)[:, -1], "running value": value, "done": others[:, -1]}
    if task.acts == "arithmetic":
        found["partial sum"] = (
            _terms(donor, task)[:, : step + 1].sum(1) + _terms(base, task)[:, step + 1 :].sum(1)
        ) % m
    return found


def _terms(operations: Ints, task: Task) -> Ints:
    """(b, s + 1): what the start, then each operation adds to the final value: shift times the later multipliers."""
    factor, shift = (np.array([OPERATIONS[name][i] for name in task.operations])[operations] for i in (0, 1))
    after = np.ones((len(operations), operations.shape[1] + 1), dtype=np.int64)  # product of the multipliers from i on
    for i in reversed(range(operations.shape[1])):
        after[:, i] = after[:, i + 1] * factor[:, i] % task.modulus
    start = task.start * after[:, :1]
    return np.concatenate([start, shift * after[:, 1:]], 1) % task.modulus


@torch.no_grad()
def handover(model: Mamba, task: Task, *, num_steps: int, n: int, seed: int) -> dict[str, Any]:
    """Hand the memory over at every word of the reasoning and count which account the answers follow.

    Returns:
        by site (the whole memory, its SSM states, its conv states, of all layers) and by step 1 to num_steps - 1, at
        the word that names the operation and at the one after it: of each account how often the answer is as foretold,
        "alone", and of how many prompts, "of", where no other account foretells the same; with 95 % intervals; of all
        prompts "none", the answers that no account foretells; and "mean", how many answers follow a value whose mean
        memory is put in, a value drawn for each prompt that is not its own.
    Cost: 9 (num_steps - 1) forwards of n rows.
    """
    base, donor, ids, others, first = apart(task, num_steps, n, seed)
    operations, rng = base.operations.numpy(), np.random.default_rng([STREAM, seed, 2])
    names = {int(k): v for v, k in enumerate(task.value_ids)}
    found: dict[str, Any] = {"num_steps": num_steps, "prompts": n, "steps": list(range(1, num_steps))}

    def answers(place: Address, memory: Tensor) -> Ints:
        said = run(model, ids, edits=[Set(place, memory)], last_only=True).last_logits.argmax(-1)
        return np.array([names.get(int(k), -1) for k in said])

    for site in SITES:
        rows = []
        for step in range(1, num_steps):
            foretold = accounts(operations, donor.operations.numpy(), step, task)
            values, own = (task.values(x.operations.numpy())[:, step - 1] for x in (donor, base))
            there = np.unique(values)
            for word in ("operation", "after"):
                pos = first + 2 * (step - 1) + (word == "after")
                place = getattr(at, site)(layer=slice(None), pos=pos)
                given = run(model, others, record=[place], last_only=True)[place]  # (layers, b, ...)
                row = {"step": step, "word": word, **_count(answers(place, given), foretold)}
                chosen = np.array([rng.choice(there[there != v] if len(there) > 1 else there) for v in own])
                means = torch.stack([given[:, values == v].mean(1) for v in there], 1)
                said = answers(place, means[:, np.searchsorted(there, chosen)])
                right = int((said == go_on(chosen, operations, step, task)).sum())
                rows.append(row | {"mean": {"right": right, "of": n, "interval": wilson(right, n)}})
        found[site] = rows
    return found


@torch.no_grad()
def shifted(model: Mamba, task: Task, *, num_steps: int, n: int, seed: int) -> list[dict[str, int]]:
    """Hand the whole memory over from the donor's step, "from", to the base's, "to".

    Returns:
        "right", in how many of n the donor's value is the likeliest of the values, as the base's remaining operations
        make it; "said", in how many the answer is a value at all: a model that counts may wait for more operations.
        All from the same n prompts.
    Cost: num_steps² forwards of n rows.
    """
    base, donor, ids, others, first = apart(task, num_steps, n, seed)
    places = [at.recurrent_state(layer=slice(None), pos=first + 2 * i + 1) for i in range(num_steps - 1)]
    memories = [run(model, others, record=[place], last_only=True)[place] for place in places]
    values, found = task.values(donor.operations.numpy()), []
    for i in range(num_steps - 1):
        for j, place in enumerate(places):
            out = run(model, ids, edits=[Set(place, memories[i])], last_only=True)
            values_said = int(torch.isin(out.last_logits.argmax(-1), task.value_ids).sum())
            likeliest = out.last_logits[:, task.value_ids].argmax(-1).numpy()
            value = go_on(values[:, i], base.operations.numpy(), j + 1, task)
            taken = int((likeliest == value).sum())
            found.append({"from": i + 1, "to": j + 1, "said": values_said, "right": taken, "of": n})
    return found


def apart(task: Task, num_steps: int, n: int, seed: int) -> tuple[Batch, Batch, Tensor, Tensor, int]:
    """Base and donor, what they read before the answer, and the position of the first operation's echo."""
    base, donor = (draw(num_steps, n, [STREAM, seed, i], task=task) for i in range(2))
    end = int(base.answer_at[0]) + 1
    return base, donor, base.ids[:, :end], donor.ids[:, :end], num_steps + (3 if task.name == "masked" else 1)


def _count(said: Ints, foretold: dict[str, Ints]) -> dict[str, Any]:
    every = np.stack(list(foretold.values()))  # (accounts, b)
    found: dict[str, Any] = {"none": int((said != every).all(0).sum())}
    for i, name in enumerate(foretold):
        alone = (np.delete(every, i, 0) != every[i]).all(0)
        right, of = int((said == every[i])[alone].sum()), int(alone.sum())
        found[name] = {"alone": right, "of": of, "interval": wilson(right, of)}
    return found
