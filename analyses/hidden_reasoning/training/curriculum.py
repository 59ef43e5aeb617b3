"""The curriculum: which lengths to draw, given how well each is solved."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import TrainingError


class Curriculum:
    """Draws lengths 1..limit with weight 1 - 0.95 * accuracy(length); the limit follows the longest length solved.

    Accuracy is a running mean over about `memory` rows of each length, from 0 at the start.

    Args:
        max_length: longest length that is ever drawn. start: the first limit.
        lead: how far the limit is beyond the longest length solved.
        solved: accuracy from which a length counts as solved. memory: rows.
    Raises:
        TrainingError: sizes that leave nothing to draw.
    """

    def __init__(self, max_length: int, *, start: int = 2, lead: int = 1, solved: float = 0.9, memory: int = 256):
        if min(max_length, start, lead, memory) < 1:
            raise TrainingError("max_length, start, lead and memory are at least 1; give larger ones.")
        if not 0 < solved < 1:
            raise TrainingError(f"solved={solved}: give an accuracy between 0 and 1.")
        self.max_length, self.lead, self.solved, self.memory = max_length, lead, solved, memory
        self.limit = min(start, max_length)
        self.accuracy = np.zeros(max_length)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(limit,) probability of each length."""
        weights = 1 - 0.95 * self.accuracy[: self.limit]
        return weights / weights.sum()

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Draw n lengths -> (n,)."""
        return rng.choice(self.limit, size=n, p=self.weights) + 1

    def update(self, lengths: ArrayLike, correct: ArrayLike) -> None:
        """Take in rows: their lengths (b,), and whether the final answer was right (b,)."""
        lengths, correct = np.asarray(lengths), np.asarray(correct, dtype=np.float64)
        for length in np.unique(lengths):
            right = correct[lengths == length]
            kept = (1 - 1 / self.memory) ** len(right)
            self.accuracy[length - 1] = kept * self.accuracy[length - 1] + (1 - kept) * right.mean()
        solved = (self.accuracy >= self.solved).nonzero()[0]
        if len(solved):
            self.limit = min(self.max_length, max(self.limit, int(solved[-1]) + 1 + self.lead))

    def done(self, accuracy: float) -> bool:
        """Whether every length up to the longest has at least this accuracy."""
        return self.limit == self.max_length and bool((self.accuracy >= accuracy).all())

    def state(self) -> dict[str, Any]:
        """All that changes, ready for JSON."""
        return {"limit": self.limit, "accuracy": self.accuracy.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.limit, self.accuracy = int(state["limit"]), np.array(state["accuracy"])
