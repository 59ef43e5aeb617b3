"""Running a compiled loop over its items, on as many threads as torch has."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
FEW = 1 << 20  # numbers: half a millisecond; to start and end two threads takes 0.3 (measured)


def run(kernel: Callable[..., None], items: int, work: int, *args: Any) -> None:
    """A loop over its items; `work` is how many numbers it makes. Threads start and end here: a fork is safe."""
    from .kernels import NUMBERS

    arrays = [array(x) if isinstance(x, Tensor) else x for x in args]
    numbers = NUMBERS[next(x.dtype for x in arrays if isinstance(x, np.ndarray))]
    threads = min(items, torch.get_num_threads()) if work > FEW else 1
    if threads == 1:
        kernel(numbers, 0, items, *arrays)
        return
    ends = [items * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(kernel, numbers, a, b, *arrays) for a, b in pairwise(ends)]
        for task in tasks:
            task.result()


def array(x: Tensor) -> Array:
    """A tensor as the loops take it: contiguous, without its graph."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()
