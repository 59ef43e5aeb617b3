"""Peak memory, each call in a process of its own: an allocator keeps what was freed, so one that has worked lies.

The growth of the resident set over what the process holds when model and inputs are there, one call, in MB. Large
blocks go back to the system when freed (MALLOC_MMAP_THRESHOLD_ is fixed by `environments`): the peak is what is held.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import peers as implementations
from .cpu import Piece, Work
from .peers import KINDS

PIECES = (
    Piece("forward", "S", 8, 256),
    Piece("train", "S", 16, 64),
    Piece("states", "S", 8, 128),
)


def _now(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def peak(do: Callable[[], object]) -> tuple[float, object]:
    """MB by which the resident set grows in one call, at most, and what the call gave.

    Raises:
        OSError: no /proc to read it from (not Linux).
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _now("VmRSS")
    kept = do()
    return max(_now("VmHWM") - before, 0.0), kept


def alone(do: Callable[[], Any]) -> Any:
    """What a call gives in a process of its own, made by fork: modules and weights are there, nothing has run."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        try:
            there.send((True, do()))
        except BaseException as e:
            there.send((False, f"{type(e).__name__}: {e}"))

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        fine, found = here.recv()
    except EOFError:
        fine, found = False, "the process died"
    process.join()
    if not fine:
        raise RuntimeError(found)
    return found


def cost(do: Callable[[], object], warm: Callable[[], object], calls: int = 0) -> dict[str, float]:
    """Peak MB of one call after a small one that warms up, and the median CPU seconds of `calls` more."""
    warm()
    found: dict[str, float] = {"mb": peak(do)[0]}
    times = []
    for _ in range(calls):
        begin = time.process_time()
        do()
        times.append(time.process_time() - begin)
        if sum(times) > 3 and len(times) >= 2:
            break
    return found | ({"seconds": sorted(times)[len(times) // 2]} if times else {})


def measure(piece: Piece, only: tuple[str, ...] = tuple(KINDS)) -> dict[str, Any]:
    """Peak MB of each implementation at a piece of work, and the ratio of the least peer to ours."""
    work = Work(piece)
    made, left = implementations.peers(work.model, piece.kind, only)
    ids, few = work.draw(piece.batch, piece.length + 1), work.draw(1, 5)
    found = {}
    for name, peer in tqdm(made.items(), desc=f"memory, {piece.name}"):
        step, _ = work.step(peer)
        found[name] = alone(lambda step=step: cost(lambda: step(ids), lambda: step(few)))["mb"]  # type: ignore[misc]
    theirs = {n: mb for n, mb in found.items() if not made[n].ours}
    least = min(theirs, key=theirs.__getitem__, default=None)
    ratio = {n: theirs[least] / max(mb, 0.1) for n, mb in found.items() if made[n].ours} if least else {}
    return {"work": f"memory, {piece.name}", "mb": found, "least_peer": least, "ratio": ratio, "left_out": left,
            "threads": torch.get_num_threads()}  # fmt: skip
