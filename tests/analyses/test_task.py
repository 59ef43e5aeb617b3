"""The tasks: text, layout, values at every position, what is held out, pairs."""

import dataclasses

import numpy as np
import pytest
import torch

from analyses.hidden_reasoning.errors import TaskError
from analyses.hidden_reasoning.task import (
    DIRECT,
    DOUBLETHINK,
    MASKED,
    NONE,
    OPERATIONS,
    Task,
    compose,
    draw,
    held_out,
    pairs,
    text,
)  # fmt: skip
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


def by_hand(task, names, hidden):
    """The row's words, and the hidden and the overt value at each, by a plain loop."""
    words, values, overt = [], [], []

    def say(word, value, shown=-1):
        words.append(word), values.append(value), overt.append(shown)

    def steps(after):
        value, letters = task.start, 0
        for i, name in enumerate(names):
            value, letters = PLAIN[name](value) % task.modulus, (letters + len(name)) % task.modulus
            seen = letters if task.name == "doublethink" else -1 if hidden else value
            say(name, value, seen)
            after(i, value, letters)
        return value, letters

    nothing = lambda *_: None  # noqa: E731
    if task.name == "direct":
        hidden = True
        steps(nothing)
    elif task.name == "masked":
        say("hide" if hidden else "show", task.start, -1 if hidden else task.start)
        value, _ = steps(nothing)
        say("\n", value, -1 if hidden else value)
        say(str(task.start), task.start, task.start)
        last = len(names) - 1
        steps(lambda i, v, _: say("_", v) if hidden and i < last else say(str(v), v, v))
    else:
        say("\n", *steps(nothing))
        value, letters = steps(lambda i, v, letters: say(str(letters), v, letters))
        say("\n", value, letters)
        say(str(value), value, letters)
    return words, values, overt


def test_the_examples_of_the_design():
    ops = [[NAMES.index(n) for n in ("one", "triple", "two")]]
    decode = MASKED.tokenizer.decode
    assert decode(compose(ops, 3, concealed=False).ids[0]) == "show one triple two\n 0 one 1 triple 3 two 0"
    assert decode(compose(ops, 3).ids[0]) == "hide one triple two\n 0 one _ triple _ two 0"
    assert text(MASKED, ["one", "triple", "two"], concealed=False) == "show one triple two\n0 one 1 triple 3 two 0"
    assert decode(compose(ops, 3, task=DOUBLETHINK).ids[0]) == "one triple two\n one 3 triple 4 two 2\n 0"
    assert text(DOUBLETHINK, ["one", "triple", "two"]) == " one triple two\n one 3 triple 4 two 2\n 0"
    direct = compose(ops, 3, task=DIRECT)
    assert decode(direct.ids[0]) == "one triple two"
    assert decode(direct.targets[0]) == "1 3 0"


TASKS = [
    MASKED, DOUBLETHINK, DIRECT, Task(7), Task(12, name="doublethink"), Task(3, ("one", "two", "double")),
    Task(start=3), Task(start=2, name="doublethink"), Task(start=4, name="direct"),
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_rows_against_a_plain_loop(task):
    rng = np.random.default_rng(3)
    steps, hidden = rng.integers(1, 10, size=60), rng.random(60) < 0.5
    batch = draw(steps, 60, 5, concealed=hidden, task=task)
    word = task.tokenizer.words
    for i, s in enumerate(steps):
        names = [task.operations[k] for k in batch.operations[i, :s]]
        length = int(batch.lengths[i])
        words, values, overt = by_hand(task, names, hidden[i])
        assert [word[k] for k in batch.ids[i, :length]] == words
        assert batch.hidden[i, :length].tolist() == values
        assert batch.overt[i, :length].tolist() == overt
        assert task.tokenizer.encode(text(task, names, bool(hidden[i]))) == batch.ids[i, :length].tolist()
        assert (batch.ids[i, length:] == task.tokenizer.pad_id).all()
        assert (batch.hidden[i, length:] == -1).all()
        assert (batch.overt[i, length:] == -1).all()
        assert batch.values[i, :s].tolist() == by_hand(DIRECT_OF[task], names, True)[1]
        assert batch.answer_ids[i] == task.value_ids[values[-1]]
        assert batch.operations[i, s:].tolist() == batch.values[i, s:].tolist() == [-1] * (int(steps.max()) - s)
    assert torch.equal(batch.num_steps, torch.from_numpy(steps))
    secret = torch.from_numpy(hidden) if task.name == "masked" else torch.ones(60, dtype=torch.bool)
    assert torch.equal(batch.concealed, secret)


DIRECT_OF = {task: dataclasses.replace(task, name="direct") for task in TASKS}


@pytest.mark.parametrize("task", [MASKED, DOUBLETHINK, DIRECT], ids=lambda t: t.name)
def test_targets_and_masks(task):
    steps = np.arange(1, 9)
    batch = draw(steps, 8, 0, concealed=[True, False] * 4, task=task)
    assert batch.ids.shape == (8, task.tokens(8))
    for i, s in enumerate(steps.tolist()):
        length, prompt = int(batch.lengths[i]), int(batch.prompt_length[i])
        assert length == task.tokens(s)
        if task.name == "direct":
            assert prompt == length == s
            assert batch.targets[i, :s].tolist() == task.value_ids[batch.values[i, :s]].tolist()
            places = list(range(s))
        else:
            assert torch.equal(batch.targets[i, : length - 1], batch.ids[i, 1:length])
            assert task.tokenizer.words[batch.ids[i, prompt - 1]] == "\n"
            places = list(range(prompt - 1, length - 1))  # what gives the words after the prompt
            assert len(places) == {"masked": 1 + 2 * s, "doublethink": 2 + 2 * s}[task.name]
        assert (batch.targets[i, places[-1] + 1 :] == NONE).all()
        assert batch.reasoning[i].nonzero()[:, 0].tolist() == places[:-1]
        assert batch.answer[i].nonzero()[:, 0].tolist() == places[-1:]


@pytest.mark.parametrize("task", [MASKED, DOUBLETHINK, DIRECT], ids=lambda t: t.name)
def test_held_out_prompts_are_those_of_evaluation_alone(task):
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 8, size=4000)
    train, fresh = (draw(steps, 4000, 1, prompts=which, task=task) for which in ("train", "held out"))
    assert not held_out(train.operations.numpy(), steps).any()
    assert np.array_equal(held_out(fresh.operations.numpy(), steps), steps >= 4)
    rows = {tuple(r) for r in train.operations[steps >= 4].tolist()}
    assert not rows & {tuple(r) for r in fresh.operations[steps >= 4].tolist()}


def test_a_tenth_is_held_out_of_every_length_value_and_first_word():
    for s in (4, 5, 9):
        batch = draw(s, 40_000, s)
        kept = torch.from_numpy(held_out(batch.operations.numpy(), np.full(40_000, s)))
        assert abs(kept.double().mean() - 0.1) < 0.015 if s == 4 else abs(kept.double().mean() - 0.1) < 0.01
        for labels in (batch.values[:, -1], batch.operations[:, 0], batch.operations[:, -1]):
            for label in labels.unique():
                assert 0.06 < kept[labels == label].double().mean() < 0.14
    wide = np.pad(batch.operations.numpy()[:50], ((0, 0), (0, 3)), constant_values=-1)
    assert np.array_equal(held_out(wide, np.full(50, 9)), kept[:50].numpy())  # padding says nothing


def test_the_control_has_the_same_words_and_cycles_and_generates_s5():
    control = Task(acts="s5")
    assert len(MASKED.closure) == 20
    assert len(control.closure) == 120
    assert control.tokenizer == MASKED.tokenizer

    def cycles(row):
        left, found = set(range(5)), []
        while left:
            v, n = left.pop(), 1
            while row[v] in left:
                v = row[v]
                left.remove(v)
                n += 1
            found.append(n)
        return sorted(found)

    assert [cycles(r) for r in MASKED.table] == [cycles(r) for r in control.table]
    batch = draw(6, 50, 0, task=control)
    for i in range(50):
        value = 0
        for j, op in enumerate(batch.operations[i].tolist()):
            value = int(control.table[op][value])
            assert batch.values[i, j] == value
    assert MASKED.invertible and control.invertible and not Task(6).invertible


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
            assert [MASKED.tokenizer.words[k] for k in [*ids, answer]] == by_hand(MASKED, names, True)[0]
            assert answer == MASKED.value_ids[values[-1]]
        equal = found.base_values[i] == found.donor_values[i]
        assert equal[:step].all()
        assert (equal[step:] == same).all()
        assert (found.base_answer[i] == found.donor_answer[i]) == same
    if which is not None:
        assert (found.which_step == which % 5).all()


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("overt", ["same", "differ", None])
def test_pairs_of_doublethink(same, overt):
    found = pairs(5, 100, 0, same_value=same, overt=overt, task=DOUBLETHINK)
    word = DOUBLETHINK.tokenizer.words
    for i in range(100):
        step = int(found.which_step[i])
        assert found.positions[i].tolist() == [step, 5 + 1 + 2 * step]
        rows = []
        for ids, answer, shown in (
            (found.base_ids[i], found.base_answer[i], found.base_overt[i]),
            (found.donor_ids[i], found.donor_answer[i], found.donor_overt[i]),
        ):
            names = [word[k] for k in ids[:5]]
            words, values, overts = by_hand(DOUBLETHINK, names, True)
            assert [word[k] for k in [*ids, answer]] == words
            assert shown.tolist() == overts[:-1]
            rows.append((words, values, overts))
        (one, values, overts), (other, others, shown) = rows
        assert one[:5][:step] + one[:5][step + 1 :] == other[:5][:step] + other[:5][step + 1 :]
        after = slice(5 + 1 + 2 * step, None)  # from the changed operation's place in the reasoning on
        assert [a == b for a, b in zip(values[after], others[after], strict=True)] == [same] * len(values[after])
        if overt:
            agree = [a == b for a, b in zip(overts[after], shown[after], strict=True)]
            assert agree == [overt == "same"] * len(agree)


def test_pairs_of_direct_have_one_place():
    found = pairs(4, 20, 0, task=DIRECT)
    assert found.base_ids.shape == (20, 4)
    assert torch.equal((found.base_ids != found.donor_ids).nonzero()[:, 1], found.positions[:, 0])
    assert (found.base_answer != found.donor_answer).all()


def test_pairs_under_a_modulus_that_is_not_prime():
    found = pairs(4, 100, 0, which_step=0, task=Task(6))
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
        (lambda: pairs(2, 4, 0, same_value=True, task=Task(5, ("one", "two"))), "no pairs"),
        (lambda: Task(2), "same operation"),
        (lambda: Task(1), "at least 2"),
        (lambda: Task("5"), "give an int"),
        (lambda: Task(name="maskd"), "'masked'"),
        (lambda: Task(start=5), "values are 0..4"),
        (lambda: Task(acts="s6"), "arithmetic, s5"),
        (lambda: Task(7, acts="s5"), "five values"),
        (lambda: pairs(3, 4, 0, overt="same"), "of doublethink"),
        (lambda: draw(3, 4, 0, prompts="all"), "held out"),
        (lambda: Task(operations=("one", "tripel")), "'triple'"),
        (lambda: Task(operations=("one",)), "at least two"),
        (lambda: Task(operations=("one", "one")), "each once"),
    ],
)
def test_bad_input_says_what_to_do(call, says):
    with pytest.raises(TaskError, match=says) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MambascopeError)
