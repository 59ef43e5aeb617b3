"""The three losses against plain loops, on padded batches, in float64."""

import pytest
import torch

from analyses.hidden_reasoning.errors import TrainingError
from analyses.hidden_reasoning.task import DIRECT, DOUBLETHINK, MASKED, draw
from analyses.hidden_reasoning.training.loss import loss, token_losses

TASKS = [MASKED, DOUBLETHINK, DIRECT]


def plain(logits, batch, task, kind, weight):
    """One example after the other, without padding, from the row's text alone."""
    total = 0.0
    for i in range(len(batch.ids)):
        length, prompt = int(batch.lengths[i]), int(batch.prompt_length[i])
        if task is DIRECT:
            wanted = list(enumerate(task.value_ids[batch.values[i, :length]].tolist()))
            first = 0
        else:
            wanted = [(t - 1, int(batch.ids[i, t])) for t in range(1, length)]
            first = 0 if kind == "all" else prompt - 1
        each = [-torch.log_softmax(logits[i, t], 0)[token] for t, token in wanted[first:]]
        if kind == "weighted":
            reasoning = sum(each[:-1]) / len(each[:-1]) if each[:-1] else 0.0
            total = total + (1 - weight) * reasoning + weight * each[-1]
        else:
            total = total + sum(each) / len(each)
    return total / len(batch.ids)


def masks(batch):
    return batch.targets, batch.reasoning, batch.answer


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("kind", "weight"), [("weighted", 0.0), ("weighted", 0.3), ("weighted", 1.0), ("reasoning", 0.5), ("all", 0.5)]
)
def test_against_a_plain_loop_with_gradients(task, kind, weight):
    steps = [1, 8, 3, 2, 5, 1]
    batch = draw(steps, 6, 0, concealed=[True, True, False, True, False, False], task=task)
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.ids.shape, 24, generator=rng, dtype=torch.float64, requires_grad=True)
    ours = loss(logits, *masks(batch), kind, weight)
    theirs = plain(logits, batch, task, kind, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(found, logits)[0] for found in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    outside = batch.targets < 0 if kind == "all" else ~(batch.reasoning | batch.answer)
    assert (grads[0][outside] == 0).all()


@pytest.mark.parametrize("kind", ["weighted", "reasoning", "all"])
def test_padding_changes_nothing_whatever_it_holds(kind):
    batch = draw([2, 7], 2, 1)
    logits = torch.randn(*batch.ids.shape, 24, dtype=torch.float64)
    short = slice(0, int(batch.lengths[0]))
    alone = loss(logits[:1, short], *(m[:1, short] for m in masks(batch)), kind)
    logits[0, short.stop :] = torch.nan
    padded = loss(logits[:1], *(m[:1] for m in masks(batch)), kind)
    assert torch.equal(padded, alone)


def test_the_reasoning_of_a_hidden_row_is_in_the_prompt():
    batch = draw(4, 50, 0)
    known = {MASKED.tokenizer.ids[w] for w in ("0", "_", *MASKED.operations)}
    assert set(batch.targets[batch.reasoning].tolist()) <= known


def test_no_loss_where_there_is_no_target():
    targets = torch.tensor([[1, -100, 2]])
    found = token_losses(torch.zeros(1, 3, 4), targets)
    torch.testing.assert_close(found, torch.tensor([[4.0, 1.0, 4.0]]).log())


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_its_range_raises(weight):
    batch = draw(1, 1, 0)
    with pytest.raises(TrainingError, match="from 0"):
        loss(torch.zeros(*batch.ids.shape, 24), *masks(batch), "weighted", weight)


def test_an_unknown_loss_raises():
    batch = draw(1, 1, 0)
    with pytest.raises(TrainingError, match="weighted, reasoning, all"):
        loss(torch.zeros(*batch.ids.shape, 24), *masks(batch), "answer")
