"""Running a compiled loop over its items, on as many threads as there are for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..threads import free, over

Array = np.ndarray[Any, Any]
FEW = 1 << 18  # numbers: an eighth of a millisecond; to wake a second thread takes 0.05 (measured)


def array(x: Tensor) -> Array:
    """A tensor as the loops take it: contiguous, without its graph."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


def run(kernel: Callable[..., None], items: int, work: int, *args: Any) -> None:
    """A loop over its items; `work` is how many numbers it makes."""
    arrays = [array(x) if isinstance(x, Tensor) else x for x in args]
    types = {x.dtype for x in arrays if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    if len(types) != 1:  # the loops' own numbers are those of one type: with another's an exp would be nonsense
        raise TypeError(f"{kernel.__name__}: arrays of {', '.join(sorted(map(str, types)))}; all must have one type.")
    spread(kernel, items, work, types.pop(), *arrays)


def spread(kernel: Callable[..., None], items: int, work: int, dtype: Any, *arrays: Any) -> None:
    """`run` of what is arrays already, of one type: for loops so short that to look at each would show."""
    from .functions import NUMBERS

    threads = 1 if work <= FEW else min(items, free())
    if threads == 1:
        kernel(NUMBERS[dtype], 0, items, *arrays)
        return
    ends = [(items * i // threads, items * (i + 1) // threads) for i in range(threads)]
    over(ends, lambda part: kernel(NUMBERS[dtype], *part, *arrays), threads)
