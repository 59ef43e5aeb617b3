"""The weighted loss against a plain loop, on padded batches, in float64."""

import pytest
import torch

from analyses.hidden_reasoning.errors import TrainingError
from analyses.hidden_reasoning.loss import token_losses, weighted_loss
from analyses.hidden_reasoning.task import MASKED, draw


def plain(logits, batch, weight):
    """One example after the other, without padding."""
    total = 0.0
    for i in range(len(batch.ids)):
        length, prompt = int(batch.lengths[i]), int(batch.prompt_length[i])
        each = [-torch.log_softmax(logits[i, t - 1], 0)[batch.ids[i, t]] for t in range(prompt, length)]
        reasoning, answer = each[:-1], each[-1]
        total = total + (1 - weight) * sum(reasoning) / len(reasoning) + weight * answer
    return total / len(batch.ids)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_against_a_plain_loop_with_gradients(weight):
    steps = [1, 8, 3, 2, 5, 1]
    batch = draw(steps, 6, 0, hidden=[True, True, False, True, False, False])
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.ids.shape, 24, generator=rng, dtype=torch.float64, requires_grad=True)
    ours = weighted_loss(logits, batch.ids, batch.reasoning, batch.answer, weight)
    theirs = plain(logits, batch, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    outside = ~(batch.reasoning | batch.answer)
    assert (grads[0][:, :-1][outside[:, 1:]] == 0).all()  # what predicts prompt or padding gets no gradient


def test_padding_changes_nothing_whatever_it_holds():
    batch = draw([2, 7], 2, 1)
    logits = torch.randn(*batch.ids.shape, 24, dtype=torch.float64)
    short = slice(0, int(batch.lengths[0]))
    alone = weighted_loss(logits[:1, short], batch.ids[:1, short], batch.reasoning[:1, short], batch.answer[:1, short])
    logits[0, short.stop :] = torch.nan
    padded = weighted_loss(logits[:1], batch.ids[:1], batch.reasoning[:1], batch.answer[:1])
    assert torch.equal(padded, alone)


def test_the_reasoning_of_a_hidden_row_is_in_the_prompt():
    batch = draw(4, 50, 0)
    known = {MASKED.tokenizer.ids[w] for w in ("0", "_", *MASKED.operations)}
    assert set(batch.ids[batch.reasoning].tolist()) <= known


def test_nothing_predicts_the_first_token():
    assert (token_losses(torch.randn(2, 5, 24), torch.zeros(2, 5, dtype=torch.long))[:, 0] == 0).all()


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_its_range_raises(weight):
    batch = draw(1, 1, 0)
    with pytest.raises(TrainingError, match="from 0"):
        weighted_loss(torch.zeros(*batch.ids.shape, 24), batch.ids, batch.reasoning, batch.answer, weight)
