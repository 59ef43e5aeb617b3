"""Timing in interleaved rounds: each does every piece of work once, so that the machine's drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

LEAST, MOST = 3, 15  # rounds
SLOW = 1.3  # a peer of so many times the fastest one's time, in the first round, is timed no more where rounds are dear


def rounds(
    steps: dict[str, tuple[Callable[[Tensor], object], float]], ids: Callable[[], Tensor], seconds: float, name: str,
    ours: set[str],
) -> dict[str, list[float]]:  # fmt: skip
    """Times of a whole work by each step, in interleaved rounds; the first warms up and says how many fit."""
    times: dict[str, list[float]] = {n: [] for n in steps}
    first: dict[str, float] = {}
    left, total = list(steps), LEAST + 1
    bar, r = tqdm(total=total, desc=name), 0
    while r < total:
        given = ids()
        for n in left[r % len(left) :] + left[: r % len(left)]:
            do, share = steps[n]
            begin = time.perf_counter()
            do(given)
            took = (time.perf_counter() - begin) / share
            if r:
                times[n].append(took)
            else:
                first[n] = took
        if r == 0:
            spent = {n: first[n] * steps[n][1] for n in left}
            dear = sum(spent.values()) * LEAST > seconds
            fastest = min((first[n] for n in left if n not in ours), default=0.0)
            slow = [n for n in left if dear and n not in ours and first[n] > SLOW * fastest]
            for n in slow:
                times[n] = [first[n]]
            left = [n for n in left if n not in slow]
            total = 1 + max(LEAST, min(MOST, int(seconds / sum(spent[n] for n in left))))
            bar.total = total
        r += 1
        bar.update()
    bar.close()
    return times


def scaling(
    steps: Mapping[str, tuple[Callable[[Tensor], object], float]], ids: Callable[[], Tensor], seconds: float, name: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Of each step its times on one thread and on all of them, in turn: {step: {"one", "all": `spread`}}.

    Each is called once before it is timed: threads that have just begun are slower, and nobody begins them every call.
    """
    every = torch.get_num_threads()
    turns = [(n, key, count, do) for n, (do, _) in steps.items() for key, count in (("one", 1), ("all", every))]
    times: dict[str, dict[str, list[float]]] = {n: {"one": [], "all": []} for n in steps}
    begun, total = time.perf_counter(), LEAST
    bar, r = tqdm(total=total, desc=f"{name}, and one"), 0
    try:
        while r < total:
            given = ids()
            for n, key, count, do in turns[r % len(turns) :] + turns[: r % len(turns)]:
                torch.set_num_threads(count)
                do(given)
                begin = time.perf_counter()
                do(given)
                times[n][key].append(time.perf_counter() - begin)
            if r == 0:
                total = max(LEAST, min(MOST, int(seconds / (time.perf_counter() - begun))))
                bar.total = total
            r += 1
            bar.update()
    finally:
        torch.set_num_threads(every)
        bar.close()
    return {n: {key: spread(t) for key, t in both.items()} for n, both in times.items()}


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and least of some seconds, and how many there are."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(times), "rounds": len(times)}
