"""Parts of one work on several threads at once: on torch's own, where they can be asked.

After each of its operations torch's OpenMP threads spin for some milliseconds. Threads beside them share a core with
one that spins and gain nothing: on 2 cores a scan of 4.0 ms takes 2.0 on torch's own threads, 4.6 on two others.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import local
from typing import TypeVar

import torch

P = TypeVar("P")
PROCESS = os.getpid()
_inside = local()  # of a thread: whether it is doing a part


def free() -> int:
    """How many threads a work may take: as many as torch has, and inside a part of another work one."""
    return 1 if getattr(_inside, "part", False) else torch.get_num_threads()


def over(parts: Iterable[P], do: Callable[[P], object], threads: int) -> None:
    """Do something with each part, on several threads, this one among them; raises what failed on one of them.

    On each the gradient and inference modes are those of the caller. Where the threads are torch's, its own operations
    stay on the thread that they were called on. In a process that was forked, and whose parent had used torch on
    several threads, torch's own operations wait for threads that are not there: `torch.set_num_threads(1)` in it.
    """
    left, failed = deque(parts), list[BaseException]()
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def share(_: object = None) -> None:
        """Take part after part until none is left, however many others do the same."""
        outer = getattr(_inside, "part", False)
        _inside.part = outer or threads > 1
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                while (part := _taken(left)) is not None:
                    do(part[0])
        except BaseException as error:  # an exception cannot leave a thread that is not Python's
            failed.append(error)
            left.clear()
        finally:
            _inside.part = outer

    parallel = _openmp() if os.getpid() == PROCESS else None  # after a fork OpenMP waits for threads that are not there
    if threads == 1:
        share()
    elif parallel is not None:
        parallel(_CALLBACK(share), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:  # starts and ends here: no thread is missed after a fork
            for _ in range(threads - 1):
                pool.submit(share)
            share()
    if failed:
        raise failed[0]


def _taken(left: deque[P]) -> tuple[P] | None:
    """The next part, which no other thread gets; None if there is none."""
    try:
        return (left.popleft(),)
    except IndexError:
        return None


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
