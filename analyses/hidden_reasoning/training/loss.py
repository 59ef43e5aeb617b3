"""What the models are trained on. `targets` holds what the logits of each position should give."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TrainingError
from ..task import NONE

LOSSES = ("weighted", "reasoning", "all")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target.

    Args:
        logits: (b, l, v). targets: (b, l), -100 where there is none.
    Returns:
        (b, l), in nats; zero where there is no target.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=NONE)
    return losses.view(targets.shape)


def row_means(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean of the losses (b, l) under the mask (b, l) in each row -> (b,); 0 in a row where the mask is empty."""
    return torch.where(mask, losses, 0).sum(1) / mask.sum(1).clamp(min=1)


def loss(
    logits: Tensor, targets: Tensor, reasoning: Tensor, answer: Tensor, kind: str = "weighted", weight: float = 0.5
) -> Tensor:
    """One of three losses, each the mean over rows, so that every example counts the same however many steps it has.

        all         the mean over the row's targets
        reasoning   the mean over its reasoning, the final answer included
        weighted    (1 - w) * the mean over its reasoning without the final answer + w * the final answer

    In a row that conceals its values the reasoning can be known from the prompt alone: 0, the operations, `_`. A row of
    one label (`direct`, one step) has no reasoning: there `weighted` is w times its final answer.

    Args:
        logits: (b, l, v). targets: (b, l), -100 where there is none.
        reasoning, answer: (b, l) True where the target is reasoning but the final answer, and where it is that.
        weight: w of the final answer, 0..1.
    Returns:
        a scalar, in nats. Raises TrainingError for an unknown kind or a weight outside 0..1.
    """
    check_loss(kind, weight)
    losses = token_losses(logits, targets)
    if kind == "all":
        return row_means(losses, targets != NONE).mean()
    if kind == "reasoning":
        return row_means(losses, reasoning | answer).mean()
    return ((1 - weight) * row_means(losses, reasoning) + weight * row_means(losses, answer)).mean()


def check_loss(kind: str, weight: float) -> None:
    """Raise TrainingError unless there is such a loss, and the weight is 0..1."""
    if kind not in LOSSES:
        raise TrainingError(f"loss={kind!r}: there are {', '.join(LOSSES)}.")
    if not 0 <= weight <= 1:
        raise TrainingError(f"answer weight {weight}: give a number from 0 (reasoning only) to 1 (final answer only).")
