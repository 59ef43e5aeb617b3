"""The least time that a piece of work could take on this machine, from rates measured beside it.

    forward = sum over matrix products of 2 m k n / rate(m, k, n)  +  layers * b l e n (4 multiply-adds + 1 exponential)

A matrix product's rate is measured at the model's own shape. A state h of the scan needs exp(dt A), dt A, (dt u) B,
decay h + write, and y + C h: one exponential and four multiply-adds, at the rates that this machine reaches on
arrays in its cache (the best of the matrix products, and `torch.exp`). Norms, convolution, SiLU, softplus, gates and
all traffic with memory count as nothing. A training step is three forwards. Capturing adds writing the states; a sweep
is two forwards and, of each cell, the layers above the edit from its position on. Decoding reads every weight once:

    token = bytes of the matrices / rate

at the rate at which the sums of matrices of these sizes are taken. (Not their products with a vector: `torch.mv` reads
at half the rate that the memory has here.)
"""

import statistics
import time
from collections.abc import Callable

import torch

from minimal_mamba import MambaConfig


def best(do: Callable[[], object], least: float = 0.02, most: int = 7) -> float:
    """Seconds of one call: the least of the medians of a few batches of calls, at least `least` seconds in all."""
    do()
    begin = time.perf_counter()
    do()
    calls = max(1, int(least / most / max(time.perf_counter() - begin, 1e-7)))
    times = []
    for _ in range(most):
        begin = time.perf_counter()
        for _ in range(calls):
            do()
        times.append((time.perf_counter() - begin) / calls)
        if sum(times) * calls > 20 * least and len(times) >= 3:
            break
    return statistics.median(times)


def products(c: MambaConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, times) of the matrices that each token passes."""
    e, layers = c.d_inner, c.n_layer
    mixer = [(c.d_model, 2 * e), (e, c.rank + 2 * c.d_state), (c.rank, e), (e, c.d_model)]
    return [(k, n, layers) for k, n in mixer] + [(c.d_model, c.padded_vocab, 1)]


def rates(c: MambaConfig, tokens: int) -> dict[str, float]:
    """Seconds of the matrix products of `tokens` tokens, and multiply-adds and exponentials a second in the cache."""
    seconds, fastest = 0.0, 0.0
    for k, n, times in products(c):
        a, w, out = torch.randn(tokens, k), torch.randn(n, k), torch.empty(tokens, n)
        took = best(lambda a=a, w=w, out=out: torch.mm(a, w.T, out=out))  # type: ignore[misc]
        seconds += times * took
        fastest = max(fastest, tokens * k * n / took)
    x = torch.randn(16384).abs_().neg_()
    out = torch.empty_like(x)
    return {
        "matrix_products_s": seconds,
        "multiply_adds_per_s": fastest,
        "exponentials_per_s": x.numel() / best(lambda: torch.exp(x, out=out)),
    }


def reading(c: MambaConfig) -> dict[str, float]:
    """Bytes of all matrices, and the bytes a second at which they are read, one after another."""
    matrices = [torch.randn(n, k) for k, n, times in products(c) for _ in range(times)]
    size = float(sum(w.nbytes for w in matrices))
    return {"weight_bytes": size, "bytes_per_s": size / best(lambda: [w.sum() for w in matrices])}


def floor(kind: str, c: MambaConfig, batch: int, length: int, new: int = 0) -> dict[str, float]:
    """Seconds below which a piece of work cannot fall, and the rates that say so."""
    tokens = batch * length
    found = rates(c, tokens)
    states = c.n_layer * tokens * c.d_inner * c.d_state
    scan = states * (4 / found["multiply_adds_per_s"] + 1 / found["exponentials_per_s"])
    forward = found["matrix_products_s"] + scan
    found |= {"scan_s": scan, "forward_s": forward}
    if kind == "train":
        return found | {"floor_s": 3 * forward}
    if kind == "states":
        to = torch.empty(min(states, 1 << 24))
        return found | {"floor_s": forward + best(lambda: to.fill_(0.0)) * states / to.numel()}
    if kind == "decode":
        found |= reading(c)
        return found | {"floor_s": forward + (new - 1) * found["weight_bytes"] / found["bytes_per_s"]}
    if kind in ("ssm_state", "resid_post"):
        # cell (i, t) computes the l - t last positions of the layers above i; the layers are alike
        share = (length + 1) / 2 * sum(range(c.n_layer)) / c.n_layer
        return found | {"floor_s": 2 * forward + forward * share}
    return found | {"floor_s": forward}
