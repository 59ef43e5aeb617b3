"""The least time that a piece of work could take on this machine, from rates measured beside it.

    forward = sum over matrix products of 2 m k n / rate(m, k, n)  +  layers * b l e n (4 multiply-adds + 1 exponential)

A matrix product's rate is measured at the model's own shape. A state h of the scan needs exp(dt A), dt A, (dt u) B,
decay h + write, and y + C h: one exponential and four multiply-adds, at the best rate of the matrix products. An
exponential is as dear as ten multiply-adds (a polynomial of degree 6, reduction, scaling), or as `torch.exp` on an
array in the cache where that is faster. Norms, convolution, SiLU, softplus, gates and all traffic with memory count as
nothing. A training step is three forwards. Capturing adds writing the states. Decoding reads every weight once:

    token = bytes of the matrices / rate

at the rate at which the sums of matrices of these sizes are taken. (Not their products with a vector: `torch.mv` reads
at half the rate that the memory has here.)

A sweep is two forwards and, of each cell, from its position on: of the layer that it enters, what its state's change
does to each token (two multiply-adds a state) and `out_proj`; each layer above; of the last one neither the gate nor y
nor `out_proj`, which its last token alone needs. A cell of `ssm_state` enters its own layer, one of `resid_post` the
next.
"""

import statistics
import time
from collections.abc import Callable

import torch

from minimal_mamba import MambaConfig

EXPONENTIAL = 10  # multiply-adds
NAMES = ("in_proj", "x_proj", "dt_proj", "out_proj", "lm_head")


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
    """(inputs, outputs, times) of the matrices that each token passes, which `NAMES` names."""
    e, layers = c.d_inner, c.n_layer
    mixer = [(c.d_model, 2 * e), (e, c.rank + 2 * c.d_state), (c.rank, e), (e, c.d_model)]
    return [(k, n, layers) for k, n in mixer] + [(c.d_model, c.padded_vocab, 1)]


def rates(c: MambaConfig, tokens: int) -> dict[str, float]:
    """Seconds of the matrix products of `tokens` tokens, and multiply-adds and exponentials a second in the cache."""
    seconds, fastest, named = 0.0, 0.0, {}
    for name, (k, n, times) in zip(NAMES, products(c), strict=True):
        a, w, out = torch.randn(tokens, k), torch.randn(n, k), torch.empty(tokens, n)
        took = best(lambda a=a, w=w, out=out: torch.mm(a, w.T, out=out))  # type: ignore[misc]
        seconds += times * took
        fastest = max(fastest, tokens * k * n / took)
        named[f"{name}_s"] = took
    x = torch.randn(16384).abs_().neg_()
    out = torch.empty_like(x)
    return named | {
        "matrix_products_s": seconds,
        "multiply_adds_per_s": fastest,
        "exponentials_per_s": max(fastest / EXPONENTIAL, x.numel() / best(lambda: torch.exp(x, out=out))),
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
        enters = range(kind == "resid_post", c.n_layer - 1)  # layers; in the last one a cell is its last token
        above = sum(c.n_layer - 2 - i for i in enters)  # layers of all cells of one position that run whole
        scan, multiply_adds = scan / c.n_layer, states / c.n_layer / found["multiply_adds_per_s"]
        r, n = c.rank, c.d_state
        whole = found["in_proj_s"] + found["x_proj_s"] + found["dt_proj_s"] + found["out_proj_s"] + scan
        last = (
            found["in_proj_s"] / 2
            + found["x_proj_s"] * (r + n) / (r + 2 * n)
            + found["dt_proj_s"]
            + scan
            - multiply_adds
        )
        carried = found["out_proj_s"] + 2 * multiply_adds
        cells = (length + 1) / 2 * (above * whole + len(enters) * (last + carried))  # (l + 1) / 2 positions of each
        return found | {"floor_s": 2 * forward + cells}
    return found | {"floor_s": forward}
