"""The masked task: text, layout, values, pairs."""

import dataclasses

import numpy as np
import pytest
import torch

from analyses.hidden_reasoning.errors import TaskError
from analyses.hidden_reasoning.task import MASKED, OPERATIONS, MaskedTask, compose, draw, pairs
from minimal_mamba import MambascopeError

NAMES = list(OPERATIONS)
PLAIN = {
    "one": lambda v: v + 1,
    "two": lambda v: v + 2,
    "three": lambda v: v + 3,
    "four": lambda v: v + 4,
    "double": lambda v: 2 * v,
    "triple": lambda v: 3 * v,
    "quad": lambda v: 4 * v,
}


def text_of(task, names, hidden):
    """The row, written by hand."""
    value, words = 0, ["0"]
    for i, name in enumerate(names):
        value = PLAIN[name](value) % task.modulus
        words += [name, "_" if hidden and i < len(names) - 1 else str(value)]
    return f"{'hide' if hidden else 'show'} {' '.join(names)}\n {' '.join(words)}"


def test_the_examples_of_the_design():
    ops = [[NAMES.index(n) for n in ("one", "triple", "two")]]
    decode = MASKED.tokenizer.decode
    assert decode(compose(ops, 3, hidden=False).ids[0]) == "show one triple two\n 0 one 1 triple 3 two 0"
    assert decode(compose(ops, 3).ids[0]) == "hide one triple two\n 0 one _ triple _ two 0"


@pytest.mark.parametrize(
    "task", [MASKED, MaskedTask(7), MaskedTask(12), MaskedTask(3, ("one", "two", "double"))], ids=str
)
def test_rows_against_a_plain_loop(task):
    rng = np.random.default_rng(3)
    steps, hidden = rng.integers(1, 10, size=60), rng.random(60) < 0.5
    batch = draw(steps, 60, 5, hidden=hidden, task=task)
    for i, s in enumerate(steps):
        names = [task.operations[k] for k in batch.operations[i, :s]]
        length = int(batch.lengths[i])
        assert task.tokenizer.decode(batch.ids[i, :length]) == text_of(task, names, hidden[i])
        assert (batch.ids[i, length:] == task.tokenizer.pad_id).all()
        value = 0
        for j, name in enumerate(names):
            value = PLAIN[name](value) % task.modulus
            assert int(batch.values[i, j]) == value
        assert batch.answer_ids[i] == batch.ids[i, length - 1] == task.value_ids[value]
        assert batch.operations[i, s:].tolist() == batch.values[i, s:].tolist() == [-1] * (int(steps.max()) - s)
    assert torch.equal(batch.num_steps, torch.from_numpy(steps))
    assert torch.equal(batch.hidden, torch.from_numpy(hidden))


def test_masks_and_lengths():
    steps = np.arange(1, 9)
    batch = draw(steps, 8, 0, hidden=[True, False] * 4)
    assert batch.ids.shape == (8, 27)
    for i, s in enumerate(steps.tolist()):
        text = MASKED.tokenizer.decode(batch.ids[i, : batch.lengths[i]])
        prompt, reasoning = text.split("\n")
        assert len(MASKED.tokenizer.encode(reasoning)) == 1 + 2 * s
        assert len(MASKED.tokenizer.encode(prompt + "\n")) == batch.prompt_length[i]
        places = list(range(int(batch.prompt_length[i]), int(batch.lengths[i])))
        assert batch.reasoning[i].nonzero()[:, 0].tolist() == places[:-1]
        assert batch.answer[i].nonzero()[:, 0].tolist() == places[-1:]


def test_deterministic_by_seed_and_uniform():
    one, again, other = draw(4, 7000, 1), draw(4, 7000, 1), draw(4, 7000, 2)
    for f in dataclasses.fields(one):
        assert torch.equal(getattr(one, f.name), getattr(again, f.name))
    assert not torch.equal(one.ids, other.ids)
    counts = torch.bincount(one.operations.flatten(), minlength=7)
    assert ((counts - 4000).abs() < 5 * 60).all()  # five standard deviations of a uniform draw
    pair_counts = torch.bincount(7 * one.operations[:, 0] + one.operations[:, 1], minlength=49)
    assert ((pair_counts - 7000 / 49).abs() < 5 * 12).all()


@pytest.mark.parametrize("which", [None, 0, 2, -1])
@pytest.mark.parametrize("same", [False, True])
def test_pairs(which, same):
    found = pairs(5, 200, 0, which_step=which, same_value=same)
    assert found.base_ids.shape == found.donor_ids.shape == (200, 3 * 5 + 2)
    for i in range(200):
        step = int(found.which_step[i])
        differs = (found.base_ids[i] != found.donor_ids[i]).nonzero()[:, 0].tolist()
        assert differs == found.positions[i].tolist() == [1 + step, 5 + 3 + 2 * step]
        for ids, values, answer in (
            (found.base_ids[i], found.base_values[i], found.base_answer[i]),
            (found.donor_ids[i], found.donor_values[i], found.donor_answer[i]),
        ):
            names = MASKED.tokenizer.decode(ids).split("\n")[0].split()[1:]
            row = text_of(MASKED, names, True)
            assert MASKED.tokenizer.decode([*ids, answer]) == row
            assert answer == MASKED.value_ids[values[-1]]
        equal = found.base_values[i] == found.donor_values[i]
        assert equal[:step].all()
        assert (equal[step:] == same).all()
        assert (found.base_answer[i] == found.donor_answer[i]) == same
    if which is not None:
        assert (found.which_step == which % 5).all()


def test_pairs_under_a_modulus_that_is_not_prime():
    found = pairs(4, 100, 0, which_step=0, task=MaskedTask(6))
    assert (found.base_values != found.donor_values).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: draw(0, 3, 0), "at least one step"),
        (lambda: draw([1, 0], 2, 0), "at least one step"),
        (lambda: draw(1.5, 3, 0), "give an int"),
        (lambda: draw([1, 2], 3, 0), "each of the 3 rows"),
        (lambda: draw(3, 0, 0), "at least one row"),
        (lambda: compose([[9]], 1), "indices 0..6"),
        (lambda: compose([[1]], 2), "operations for 1 steps"),
        (lambda: compose([1], 1), "rows, steps"),
        (lambda: pairs(3, 4, 0, which_step=3), "steps 0..2"),
        (lambda: pairs(2, 4, 0, same_value=True, task=MaskedTask(5, ("one", "two"))), "no pairs"),
        (lambda: MaskedTask(2), "same operation"),
        (lambda: MaskedTask(1), "at least 2"),
        (lambda: MaskedTask("5"), "give an int"),
        (lambda: MaskedTask(operations=("one", "tripel")), "'triple'"),
        (lambda: MaskedTask(operations=("one",)), "at least two"),
        (lambda: MaskedTask(operations=("one", "one")), "each once"),
    ],
)
def test_bad_input_says_what_to_do(call, says):
    with pytest.raises(TaskError, match=says) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MambascopeError)
