"""The loops that LLVM compiles, through numba: the scan and its backward, the convolution and its backward.

Work is cut into items, a row of the batch times `width` channels, that share nothing: which thread runs which item
changes no result. Along time a loop is sequential; along channels it is vectorised, so a state is (n, channels).
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload"
# numba gives the types

import numpy as np

from .functions import _exp2, _jit, _whole_vectors, dot, turn

DECAY, STATE_WRITE, SSM_STATE, STATE_READ = 1, 2, 3, 4  # the site of a move


def width(n: int) -> int:
    """Channels of an item: some vectors of them, and a state that fits the first cache."""
    return max(16, min(256, 2048 // n // 16 * 16))


@_jit
def _copy(source, into):
    """into = source; (n, channels), of which `into` may be wider."""
    for i in range(len(source)):
        for c in range(source.shape[1]):
            into[i, c] = source[i, c]


@_jit
def _lay_out(p, A, into):
    """into = A / ln 2, (n, channels), as `_exp2` takes it."""
    for i in range(len(A)):
        for c in range(A.shape[1]):
            into[i, c] = A[i, c] * p[-2]


@_jit
def scan(p, first, stop, wide, step, u, dt, A, B, C, h, added_at, added, keep, kept, y, last, starts):
    """The items first..stop of `scan.scan`. A: (n, e). starts: (b, chunks or 0, n, e) the state before each chunk."""
    _whole_vectors()
    _, l, e = u.shape
    n = len(A)
    across = (e + wide - 1) // wide
    A_c, state = np.empty((n, wide), u.dtype), np.empty((n, wide), u.dtype)
    d, w, total = np.empty(wide, u.dtype), np.empty(wide, u.dtype), np.empty(wide, u.dtype)
    for item in range(first, stop):
        r, c0 = item // across, item % across * wide
        m = min(wide, e - c0)
        here = slice(c0, c0 + m)  # views count from 0: of an index that might be negative LLVM makes a gather
        _lay_out(p, A[:, here], A_c)
        turn(h[r, here], state)
        a = k = 0  # the next of added, of kept
        for t in range(l):
            if starts.shape[1] and t % step == 0:
                _copy(state[:, :m], starts[r, t // step, :, here])
            u_t, dt_t, y_t = u[r, t, here], dt[r, t, here], y[r, t, here]
            for c in range(m):
                d[c] = dt_t[c]
                w[c] = d[c] * u_t[c]
                total[c] = 0
            plus = a < len(added_at) and added_at[a] == t
            for i in range(n):
                B_i, C_i = B[r, t, i], C[r, t, i]
                if plus:
                    for c in range(m):
                        state[i, c] = _exp2(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i + added[r, a, c0 + c, i]
                        total[c] += C_i * state[i, c]
                else:
                    for c in range(m):
                        now = _exp2(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i
                        state[i, c] = now
                        total[c] += C_i * now
            for c in range(m):
                y_t[c] = total[c]
            a += plus
            if k < len(keep) and keep[k] == t:
                turn(state[:, :m], kept[r, k, here])
                k += 1
        turn(state[:, :m], last[r, here])


@_jit
def _difference(p, site, runs, begin, end, r, c0, m, A_c, u, dt, B, from_starts, state, decay, states, own, moved):
    """A chunk of a move's donor - base, at one site, into moved (tokens n, channels); row s n + i is of token s.

    u, dt, B, from_starts: of each of the runs, the donor and then the base; without the latter the base is the present
    run: `own` = (u, dt, B), with its `decay` and its `states`, of which row s n + i is before token s.
    """
    n, here = len(A_c), slice(c0, c0 + m)
    for run in range(runs):
        if site >= SSM_STATE:
            _copy(from_starts[run, r, :, here], state)
        for t in range(begin, end):
            u_t, dt_t = u[run, r, t, here], dt[run, r, t, here]
            for i in range(n):
                B_i, s = B[run, r, t, i], (t - begin) * n + i
                for c in range(m):
                    d = dt_t[c]
                    x = _exp2(d * A_c[i, c], p)
                    if site != DECAY:
                        write = d * u_t[c] * B_i
                        now = x * state[i, c] + write
                        state[i, c] = now
                        x = write if site == STATE_WRITE else now
                    moved[s, c] = x if run == 0 else moved[s, c] - x
    if runs == 1:
        for t in range(begin, end):
            u_t, dt_t = own[0][r, t, here], own[1][r, t, here]
            for i in range(n):
                B_i, s = own[2][r, t, i], (t - begin) * n + i
                for c in range(m):
                    if site == DECAY:
                        moved[s, c] -= decay[s, c]
                    elif site == STATE_WRITE:
                        moved[s, c] -= dt_t[c] * u_t[c] * B_i
                    else:
                        moved[s, c] -= states[s + n, c]


@_jit
def _contract(site, t, s, r, block, c0, m, G, out, C, states, moved, dsize, axes):
    """Take the gradient of a token times its difference into dsize: per channel and state, per channel, or per state.

    axes 2: (b, l, e, n). 1: (b, l, e, 1). 0: (b, blocks, l, n).
    """
    for i in range(len(G)):
        for c in range(m):
            g = C[r, t, i] * out[c] if site == STATE_READ else G[i, c]
            moved[s + i, c] *= g * states[s + i, c] if site == DECAY else g
        if axes == 2:
            for c in range(m):
                dsize[r, t, c0 + c, i] = moved[s + i, c]
        elif axes == 1:
            for c in range(m):
                dsize[r, t, c0 + c, 0] = moved[s + i, c] if i == 0 else dsize[r, t, c0 + c, 0] + moved[s + i, c]
        else:
            total = moved[s + i, 0]
            for c in range(1, m):
                total += moved[s + i, c]
            dsize[r, block, t, i] = total


@_jit
def scan_backward(
    p, first, stop, wide, step, u, dt, A, B, C, added_at, added, keep, starts, dy, dlast, dkept,
    du, ddt, dA, dB, dC, dh, dadded, site, axes, runs_u, runs_dt, runs_B, runs_starts, dsize,
):  # fmt: skip
    """The items first..stop of the backward. dA: (b, n, e). dB, dC: (b, blocks of channels, l, n), to be summed.

    site > 0: also a move toward other runs, (runs, b, l, ...) each, whose gradient goes into dsize.
    """
    _whole_vectors()
    _, l, e = u.shape
    n = len(A)
    across = (e + wide - 1) // wide
    A_c, flow, dA_c, G = (np.empty((n, wide), u.dtype), np.empty((n, wide), u.dtype), np.empty((n, wide), u.dtype),
                          np.empty((n, wide), u.dtype))  # fmt: skip
    decay, states = np.empty((step * n, wide), u.dtype), np.empty((step * n + n, wide), u.dtype)
    moved = np.empty((step * n if site else 0, wide), u.dtype)
    d, w, out = np.empty(wide, u.dtype), np.empty(wide, u.dtype), np.empty(wide, u.dtype)
    by_w, by_d = np.empty(wide, u.dtype), np.empty(wide, u.dtype)
    for item in range(first, stop):
        r, block = item // across, item % across
        c0 = block * wide
        m = min(wide, e - c0)
        here = slice(c0, c0 + m)
        _lay_out(p, A[:, here], A_c)
        turn(dlast[r, here], flow)
        dA_c[:] = 0
        a, k = len(added_at) - 1, len(keep) - 1
        for chunk in range(starts.shape[1] - 1, -1, -1):
            begin = chunk * step
            end = min(begin + step, l)
            _copy(starts[r, chunk, :, here], states)
            a0 = a + 1
            while a0 > 0 and added_at[a0 - 1] >= begin:
                a0 -= 1
            for t in range(begin, end):  # the states again; row s n + i of `states` is before token s of the chunk
                u_t, dt_t = u[r, t, here], dt[r, t, here]
                for c in range(m):
                    d[c] = dt_t[c]
                    w[c] = d[c] * u_t[c]
                for i in range(n):
                    B_i, s = B[r, t, i], (t - begin) * n + i
                    for c in range(m):
                        x = _exp2(d[c] * A_c[i, c], p)
                        decay[s, c] = x
                        states[s + n, c] = x * states[s, c] + w[c] * B_i
                if a0 < len(added_at) and added_at[a0] == t:
                    for c in range(m):
                        for i in range(n):
                            states[(t - begin + 1) * n + i, c] += added[r, a0, c0 + c, i]
                    a0 += 1
            if site:
                _difference(p, site, len(runs_u), begin, end, r, c0, m, A_c, runs_u, runs_dt, runs_B,
                            runs_starts[chunk], G, decay, states, (u, dt, B), moved)  # fmt: skip
            for t in range(end - 1, begin - 1, -1):
                u_t, dt_t, dy_t, du_t, ddt_t = (
                    u[r, t, here],
                    dt[r, t, here],
                    dy[r, t, here],
                    du[r, t, here],
                    ddt[r, t, here],
                )
                for c in range(m):
                    d[c] = dt_t[c]
                    w[c] = d[c] * u_t[c]
                    out[c] = dy_t[c]
                    by_w[c] = by_d[c] = 0
                if k >= 0 and keep[k] == t:
                    for c in range(m):
                        for i in range(n):
                            flow[i, c] += dkept[r, k, c0 + c, i]
                    k -= 1
                for i in range(n):
                    B_i, C_i, s = B[r, t, i], C[r, t, i], (t - begin) * n + i
                    for c in range(m):
                        g = flow[i, c] + C_i * out[c]  # dL/dh
                        G[i, c] = g
                        by_w[c] += g * B_i
                        flow[i, c] = decay[s, c] * g
                        power = g * states[s, c] * decay[s, c]  # dL/d(dt A)
                        by_d[c] += power * A_c[i, c]
                        dA_c[i, c] += power * d[c]
                    dB[r, block, t, i] = dot(G, w, i, m)
                    dC[r, block, t, i] = dot(states, out, s + n, m)
                if site:
                    _contract(site, t, (t - begin) * n, r, block, c0, m, G, out, C, states, moved, dsize, axes)
                if a >= 0 and added_at[a] == t:
                    for c in range(m):
                        for i in range(n):
                            dadded[r, a, c0 + c, i] = G[i, c]
                    a -= 1
                for c in range(m):
                    du_t[c] = by_w[c] * d[c]
                    ddt_t[c] = by_d[c] * p[-1] + by_w[c] * u_t[c]  # A_c is A / ln 2
        _copy(dA_c[:, :m], dA[r, :, here])
        turn(flow[:, :m], dh[r, here])


@_jit
def conv(p, first, stop, x, weight, bias, out):
    """Rows first..stop of out_t = bias + sum_i weight_i x_{t+i}; x: (b, k - 1 + l, e), weight: (k, e)."""
    _whole_vectors()
    _, l, e = out.shape
    k = len(weight)
    for r in range(first, stop):
        for t in range(l):
            if k == 4:
                for c in range(e):
                    out[r, t, c] = (bias[c] + weight[0, c] * x[r, t, c] + weight[1, c] * x[r, t + 1, c]
                                    + weight[2, c] * x[r, t + 2, c] + weight[3, c] * x[r, t + 3, c])  # fmt: skip
                continue
            for c in range(e):
                out[r, t, c] = bias[c]
            for i in range(k):
                for c in range(e):
                    out[r, t, c] += weight[i, c] * x[r, t + i, c]


@_jit
def conv_backward(p, first, stop, x, weight, dout, dx, dweight):
    """Rows first..stop of the backward; dx and dweight (b, k, e), to be summed over rows, begin as zeros."""
    _whole_vectors()
    _, l, e = dout.shape
    for r in range(first, stop):
        for t in range(l):
            for i in range(len(weight)):
                for c in range(e):
                    dx[r, t + i, c] += weight[i, c] * dout[r, t, c]
                    dweight[r, i, c] += x[r, t + i, c] * dout[r, t, c]
