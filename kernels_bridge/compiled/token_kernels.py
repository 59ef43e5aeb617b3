"""The loops that go token by token: a whole mixer for one, the norm of a sum.

A state lies as (channels, n) here, as it is carried and recorded. Alone, a token costs what reading the weights costs:
a product reads each row of its matrix once for all rows of the batch, as fast as the memory gives it, on one core of an
AMD EPYC 26 to 31 GB/s, where torch's `mv` reaches 13 to 16.
"""

# mypy: disable-error-code="no-untyped-def, call-arg"
# numba gives the types

from functools import partial

import numpy as np

from .functions import _exp, _jit, _silu, _softplus, _whole_vectors


@partial(_jit, flags=("contract", "reassoc"))
def add_norm(p, first, stop, eps, resid, mixed, weight, total, normal):
    """Tokens first..stop of total = resid + mixed and normal = total / sqrt(mean(total^2) + eps) * weight.

    Args:
        resid, total, normal: (b, l, d). mixed: the same, or (0, l, d) for nothing. weight: (d).
    """
    _whole_vectors()
    _, l, d = resid.shape
    for token in range(first, stop):
        r, t = token // l, token % l
        for c in range(d):
            total[r, t, c] = resid[r, t, c]
        if len(mixed):
            for c in range(d):
                total[r, t, c] += mixed[r, t, c]
        square = weight.dtype.type(0)
        for c in range(d):
            square += total[r, t, c] * total[r, t, c]
        scale = weight.dtype.type(1 / np.sqrt(square / d + eps))
        for c in range(d):
            normal[r, t, c] = total[r, t, c] * scale * weight[c]


@partial(_jit, flags=("contract", "reassoc"))
def product(weight, x, bias, out):
    """out = x weight^T + bias; x (b, in), weight (out, in), bias (out) or (0)."""
    _whole_vectors()
    fours, m = len(x) // 4 * 4, weight.shape[1]
    for i in range(len(weight)):
        plus = bias[i] if len(bias) else bias.dtype.type(0)
        for r in range(0, fours, 4):
            a = b = c = d = plus
            for j in range(m):
                a += weight[i, j] * x[r, j]
                b += weight[i, j] * x[r + 1, j]
                c += weight[i, j] * x[r + 2, j]
                d += weight[i, j] * x[r + 3, j]
            out[r, i], out[r + 1, i], out[r + 2, i], out[r + 3, i] = a, b, c, d
        for r in range(fours, len(x)):
            a = plus
            for j in range(m):
                a += weight[i, j] * x[r, j]
            out[r, i] = a


@partial(_jit, flags=("contract", "reassoc"))
def _divide(x, eps):
    """x (b, m) by each row's root mean square."""
    m = x.shape[1]
    for r in range(len(x)):
        square = x.dtype.type(0)
        for i in range(m):
            square += x[r, i] * x[r, i]
        scale = x.dtype.type(1 / np.sqrt(square / m + eps))
        for i in range(m):
            x[r, i] *= scale


@_jit
def _window(x, weight, bias, before, after, conv):
    """One row's window after an input, and the convolution; x, bias, conv: (e), weight, before, after: (e, k)."""
    k = weight.shape[1]
    for c in range(len(conv)):
        total = bias[c]
        for i in range(1, k):
            after[c, i - 1] = before[c, i]
            total += weight[c, i - 1] * before[c, i]
        after[c, k - 1] = x[c]
        conv[c] = total + weight[c, k - 1] * x[c]


@_jit
def _write(p, n, u, dt, A, B, before, after):
    """One row's states after a token; u, dt: (e), A, before, after: (e, n), B: (n)."""
    for c in range(len(u)):
        d, w = dt[c], dt[c] * u[c]
        for i in range(n):
            after[c, i] = _exp(d * A[c, i], p) * before[c, i] + w * B[i]


@partial(_jit, flags=("contract", "reassoc"))
def _read(n, C, state, y):
    """What one row's states give; C: (n), state: (e, n), y: (e)."""
    for c in range(len(y)):
        total = C.dtype.type(0)
        for i in range(n):
            total += state[c, i] * C[i]
        y[c] = total


@_jit
def _recur(p, u, dt, A, B, C, before, after, y):
    """One row's states after a token, and what they give."""
    n = len(B)
    if n == 16:  # the usual size: LLVM makes one vector of it
        _write(p, 16, u, dt, A, B, before, after)
        _read(16, C, after, y)
    else:
        _write(p, n, u, dt, A, B, before, after)
        _read(n, C, after, y)


@_jit
def step(p, first, stop, in_proj, in_bias, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj, out_bias, no_bias,
         eps, x, h, window, out, h_after, window_after):  # fmt: skip
    """`Mixer.forward` for one token of each of the rows first..stop.

    Args:
        in_proj (2 e, d), x_proj (r + 2 n, e), dt_proj (e, r), out_proj (d, e), and what is added behind three of them,
        or (0). conv (e, k), conv_bias (e), A (e, n), D (e). eps: of FalconMamba's norms; below 0: none.
        x, out: (b, d). h, h_after: (b, e, n). window, window_after: (b, e, k).
    """
    _whole_vectors()
    (_, e, n), r, b, dtype = h.shape, dt_proj.shape[1], stop - first, x.dtype
    xz, low = np.empty((b, 2 * e), dtype), np.empty((b, r), dtype)
    B, C = np.empty((b, n), dtype), np.empty((b, n), dtype)
    u, dt, y = np.empty((b, e), dtype), np.empty((b, e), dtype), np.empty((b, e), dtype)
    product(in_proj, x[first:stop], in_bias, xz)
    for row in range(b):
        _window(xz[row], conv, conv_bias, window[first + row], window_after[first + row], u[row])
        for c in range(e):
            u[row, c] = _silu(u[row, c], p)
    product(x_proj[:r], u, no_bias, low)
    product(x_proj[r : r + n], u, no_bias, B)
    product(x_proj[r + n :], u, no_bias, C)
    if eps >= 0:
        for part in (low, B, C):
            _divide(part, eps)
    product(dt_proj, low, dt_bias, dt)
    for row in range(b):
        for c in range(e):
            dt[row, c] = _softplus(dt[row, c], p)
        _recur(p, u[row], dt[row], A, B[row], C[row], h[first + row], h_after[first + row], y[row])
        for c in range(e):
            u[row, c] = (y[row, c] + D[c] * u[row, c]) * _silu(xz[row, e + c], p)
    product(out_proj, u, out_bias, out[first:stop])
