"""Running a compiled loop over its items, on as many threads as torch has."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..threads import over

Array = np.ndarray[Any, Any]
FEW = 1 << 18  # numbers: an eighth of a millisecond; to wake a second thread takes 0.05 (measured)


def array(x: Tensor) -> Array:
    """A tensor as the loops take it: contiguous, without its graph."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


def run(kernel: Callable[..., None], items: int, work: int, *args: Any) -> None:
    """A loop over its items; `work` is how many numbers it makes."""
    from .kernels import NUMBERS

    arrays = [array(x) if isinstance(x, Tensor) else x for x in args]
    numbers = NUMBERS[next(x.dtype for x in arrays if isinstance(x, np.ndarray))]
    threads = min(items, torch.get_num_threads()) if work > FEW else 1
    if threads == 1:
        kernel(numbers, 0, items, *arrays)
        return
    ends = [(items * i // threads, items * (i + 1) // threads) for i in range(threads)]
    over(ends, lambda part: kernel(numbers, *part, *arrays), threads)
