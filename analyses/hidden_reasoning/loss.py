"""What the models are trained on. Logits at position t - 1 predict token t."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import TrainingError


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it.

    Args:
        logits: (b, l, v). ids: (b, l).
    Returns:
        (b, l), in nats; zero at position 0, which nothing predicts.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (1, 0))  # (b, l)


def row_means(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean of the losses (b, l) under the mask (b, l) in each row -> (b,); 0 in a row where the mask is empty."""
    return torch.where(mask, losses, 0).sum(1) / mask.sum(1).clamp(min=1)


def weighted_loss(logits: Tensor, ids: Tensor, reasoning: Tensor, answer: Tensor, weight: float = 0.5) -> Tensor:
    """Reasoning and final answer, weighed against each other.

        mean over rows of (1 - w) * mean over the row's reasoning tokens + w * the row's final answer

    Means are taken within a row first, so that every example counts the same however many steps it has. In a hidden
    row the reasoning tokens can be known from the prompt alone: 0, the operations, `_`.

    Args:
        logits: (b, l, v). ids: (b, l).
        reasoning, answer: (b, l) True on the reasoning tokens but the final answer, and on that; False on padding.
        weight: w of the final answer, 0..1.
    Returns:
        a scalar, in nats. Raises TrainingError for a weight outside 0..1.
    """
    check_weight(weight)
    losses = token_losses(logits, ids)
    return ((1 - weight) * row_means(losses, reasoning) + weight * row_means(losses, answer)).mean()


def check_weight(weight: float) -> None:
    """Raise TrainingError unless the weight is 0..1."""
    if not 0 <= weight <= 1:
        raise TrainingError(f"answer weight {weight}: give a number from 0 (reasoning only) to 1 (final answer only).")
