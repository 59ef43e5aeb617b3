"""The loops of a whole mixer: what lies between its matrix products, as mamba-ssm's kernels cut it.

conv        u = SiLU(conv(x))                                        causal_conv1d_fn
recurrence  dt = softplus(raw + bias), the scan, + D u, SiLU(z)      selective_scan_fn
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload"
# numba gives the types

import numpy as np

from .functions import _exp2, _jit, _silu, _softplus, _whole_vectors, turn
from .kernels import _copy, _lay_out


@_jit
def conv(p, first, stop, x, window, weight, bias, u):
    """Rows first..stop of u = SiLU(bias + sum_i weight_i x_{t-k+1+i}).

    Args:
        x, u: (b, l, e). window: (b, k, e) before x, newest last. weight: (k, e).
    """
    _whole_vectors()
    _, l, e = u.shape
    k = len(weight)
    for r in range(first, stop):
        for t in range(l):
            u_t = u[r, t]
            if k == 4 and t >= 3:  # the usual size, at once
                x_a, x_b, x_c, x_d = x[r, t - 3], x[r, t - 2], x[r, t - 1], x[r, t]
                for c in range(e):
                    total = bias[c] + weight[0, c] * x_a[c] + weight[1, c] * x_b[c]
                    u_t[c] = _silu(total + weight[2, c] * x_c[c] + weight[3, c] * x_d[c], p)
                continue
            for c in range(e):
                u_t[c] = bias[c]
            for i in range(k):
                at = t - k + 1 + i
                x_t = x[r, at] if at >= 0 else window[r, k + at]
                for c in range(e):
                    u_t[c] += weight[i, c] * x_t[c]
            for c in range(e):
                u_t[c] = _silu(u_t[c], p)


@_jit
def recurrence(
    p, first, stop, wide, u, raw, bias, A, low, rank, D, z, out, last_only, sizes, h, after, keep, kept, s, step, starts
):  # fmt: skip
    """The items first..stop of out = (scan(u, softplus(raw + bias)) + D u) SiLU(z); an item is as in `kernels.scan`.

    Args:
        u, raw: (b, l, e). A: (n, e). low: (b, l, rank + 2 n), which ends with B and C.
        z, out: (b, l, e); out may be raw: a token is read before it is written.
        last_only: z and out are (b, 1, e), of each row's last token.
        sizes: (b) real tokens of each row; after them nothing happens, and `out` is 0.
        h: (b, e, n) the states before. after: those after, or (0, e, n) if nobody asks; it may be h.
        keep: positions, ascending, whose states go into kept (b, len(keep), e, n); those that are not here are not.
        s: (b, l, e) scan + D u, 0 after the tokens, or of no row. starts: (b, chunks or 0, n, e) the state before each
            `step` tokens.
    """
    _whole_vectors()
    e, n = u.shape[2], len(A)
    across = (e + wide - 1) // wide
    since = np.searchsorted(keep, 0)
    A_c, state = np.empty((n, wide), u.dtype), np.empty((n, wide), u.dtype)
    d, w, total = np.empty(wide, u.dtype), np.empty(wide, u.dtype), np.empty(wide, u.dtype)
    for item in range(first, stop):
        r, c0 = item // across, item % across * wide
        m = min(wide, e - c0)
        here = slice(c0, c0 + m)
        bias_c, D_c = bias[here], D[here]
        _lay_out(p, A[:, here], A_c)
        turn(h[r, here], state)
        k = since  # the next to keep
        for t in range(sizes[r]):
            if starts.shape[1] and t % step == 0:
                _copy(state[:, :m], starts[r, t // step, :, here])
            u_t, raw_t = u[r, t, here], raw[r, t, here]
            for c in range(m):
                d[c] = _softplus(raw_t[c] + bias_c[c], p)
            for c in range(m):
                w[c] = d[c] * u_t[c]
                total[c] = D_c[c] * u_t[c]
            if last_only and t < sizes[r] - 1:
                for i in range(n):
                    B_i = low[r, t, rank + i]
                    for c in range(m):
                        state[i, c] = _exp2(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i
            else:
                for i in range(n):
                    B_i, C_i = low[r, t, rank + i], low[r, t, rank + n + i]
                    for c in range(m):
                        now = _exp2(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i
                        state[i, c] = now
                        total[c] += C_i * now
                at = 0 if last_only else t
                z_t, out_t = z[r, at, here], out[r, at, here]
                for c in range(m):
                    out_t[c] = total[c] * _silu(z_t[c], p)
                if len(s):
                    s_t = s[r, t, here]
                    for c in range(m):
                        s_t[c] = total[c]
            if k < len(keep) and keep[k] == t:
                turn(state[:, :m], kept[r, k, here])
                k += 1
        if not last_only:
            out[r, sizes[r] :, here] = 0
        if len(s):
            s[r, sizes[r] :, here] = 0
        for chunk in range((sizes[r] + step - 1) // step, starts.shape[1]):
            _copy(state[:, :m], starts[r, chunk, :, here])
        if len(after):
            turn(state[:, :m], after[r, here])


@_jit
def carry(p, first, stop, wide, delta, dt, A, C, gate, begins, out):
    """The items first..stop of `kernels_bridge.carry`; an item is as in `kernels.scan`.

    Args:
        delta: (k, b, e, n). dt, gate: (b, l, e). A: (n, e). C: (b, l, n). begins: (k, b). out: (k, b, count, e).
    """
    _whole_vectors()
    many, _, count, e = out.shape
    l, n = dt.shape[1], len(A)
    across = (e + wide - 1) // wide
    A_c, decay, states = (
        np.empty((n, wide), dt.dtype),
        np.empty((n, wide), dt.dtype),
        np.empty((many, n, wide), dt.dtype),
    )
    total = np.empty(wide, dt.dtype)
    for item in range(first, stop):
        r, c0 = item // across, item % across * wide
        m = min(wide, e - c0)
        here = slice(c0, c0 + m)
        _lay_out(p, A[:, here], A_c)
        for k in range(many):
            turn(delta[k, r, here], states[k])
            out[k, r, max(0, l - begins[k, r]) :, here] = 0
        for t in range(begins[:, r].min(), min(l, begins[:, r].max() + count)):
            dt_t, gate_t = dt[r, t, here], gate[r, t, here]
            for i in range(n):
                for c in range(m):
                    decay[i, c] = _exp2(dt_t[c] * A_c[i, c], p)
            for k in range(many):
                at = t - begins[k, r]
                if at < 0 or at >= count:
                    continue
                state, out_t = states[k], out[k, r, at, here]
                for c in range(m):
                    total[c] = 0
                for i in range(n):
                    C_i = C[r, t, i]
                    for c in range(m):
                        now = decay[i, c] * state[i, c]
                        state[i, c] = now
                        total[c] += C_i * now
                for c in range(m):
                    out_t[c] = total[c] * gate_t[c]
