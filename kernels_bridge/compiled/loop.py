"""Running a compiled loop over its items, on as many threads as torch has: on torch's own, where they can be asked.

torch's OpenMP threads spin for some milliseconds after each of its operations. Threads beside them share a core with one
that spins, and gain nothing: on 2 cores a scan of 4.0 ms takes 2.0 on torch's own threads, 4.6 on two others.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
FEW = 1 << 18  # numbers: an eighth of a millisecond; to wake a second thread takes 0.05 (measured)
PROCESS = os.getpid()


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
    left = deque((items * i // threads, items * (i + 1) // threads) for i in range(threads))
    together(threads, lambda: share(left, lambda first, stop: kernel(numbers, first, stop, *arrays)))


def share(left: deque[tuple[int, int]], do: Callable[[int, int], None]) -> None:
    """Take part after part until none is left, however many others do the same."""
    while True:
        try:
            first, stop = left.popleft()
        except IndexError:
            return
        do(first, stop)


def together(threads: int, do: Callable[[], None]) -> None:
    """Call a function on several threads at once, on this one among them, and wait; it raises what one of them did."""
    failed: list[BaseException] = []

    def call(_: object = None) -> None:
        try:
            do()
        except BaseException as error:
            failed.append(error)

    parallel = _openmp() if os.getpid() == PROCESS else None  # after a fork OpenMP waits for threads that are not there
    if parallel is not None:
        parallel(_CALLBACK(call), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:  # starts and ends here: a fork is safe
            for _ in range(threads - 1):
                pool.submit(call)
            call()
    if failed:
        raise failed[0]


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel of the GNU OpenMP that came with torch and is loaded; None where torch has another."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        try:
            parallel = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes, parallel.restype = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return parallel
    return None
