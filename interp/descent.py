"""How a search by gradients goes down, and when it has ended."""

from collections.abc import Sequence

import torch
from torch import Tensor

FALL, FALLS = 1 / 3, 3  # of the learning rate, and how often before the search ends
PATIENCE, LESS = 4, 0.003  # epochs without a loss that is less by this share


class Descent:
    """Adam, whose learning rate falls when the loss has stopped to fall."""

    def __init__(self, weights: Sequence[Tensor], learning_rate: float):
        self.weights, self.adam = weights, torch.optim.Adam(weights, lr=learning_rate)
        self.last = learning_rate * FALL ** (FALLS - 0.5)
        self.slower = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.adam, factor=FALL, patience=PATIENCE, threshold=LESS
        )

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Of every weight its gradient."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.adam.step()

    def ended(self, loss: float) -> bool:
        """Told the loss of each epoch: whether it has stopped to fall at every learning rate."""
        self.slower.step(loss)
        return bool(self.adam.param_groups[0]["lr"] < self.last)
