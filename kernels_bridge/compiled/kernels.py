"""The loops that LLVM compiles, through numba: exp, the scan and its backward, the convolution and its backward.

Work is cut into items, a row of the batch times `width` channels, that share nothing: which thread runs which item
changes no result. Along time a loop is sequential; along channels it is vectorised, so a state is (n, channels).

`contract` lets a product and a sum be one rounding. `reassoc` is allowed in `dot` alone, so that its sum runs in
vectors: an order that is fixed when it is compiled for a processor. No flag lets the compiler take NaN or infinity for
impossible.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload"
# numba gives the types

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

DECAY, STATE_WRITE, SSM_STATE, STATE_READ = 1, 2, 3, 4  # the site of a move


def width(n: int) -> int:
    """Channels of an item: some vectors of them, and a state that fits the first cache."""
    return max(16, min(256, 2048 // n // 16 * 16))


def _jit(function, flags=("contract",)):
    how = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    try:
        return njit(function, cache=True, **how)  # compiled once on a machine
    except RuntimeError:  # no folder that it may write to: once a process
        return njit(function, **how)


@intrinsic
def _scaled(context, p, k):
    """p 4^j of k = j + 1.5 2^52 (of float32, 2^23): the last bits of k are j, which becomes an exponent."""
    bits, bias, fraction = (32, 127, 23) if p == types.float32 else (64, 1023, 52)

    def build(context, builder, signature, args):
        p, k = args
        integer = ir.IntType(bits)
        j = builder.shl(builder.bitcast(k, integer), ir.Constant(integer, fraction))
        power = builder.bitcast(builder.add(j, ir.Constant(integer, bias << fraction)), p.type)  # 2^j
        return builder.fmul(builder.fmul(p, power), power)  # the first product is exact, the second rounds denormals

    return p(p, k), build


@intrinsic
def _whole_vectors(context):
    """LLVM uses all 512 bits where a processor has them; of itself it takes half on most of Intel's."""

    def build(context, builder, signature, args):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add knows few names
        return context.get_dummy_value()

    return types.none(), build


# The numbers of `_exp`: bounds beyond which all is 0 or inf, 1.5 2^23 or 2^52, 1 / ln 4, ln 4 in two parts, and the
# polynomial's coefficients from r^2 up. They are arguments of the loops: of constants LLVM reads each from memory anew.
_SINGLE = tuple(
    np.float32(c)
    for c in (-104, 90, 1.5 * 2**23, 0.72134752044448170, 1.38629150390625, 2.8572136406188344642e-6, 1.0,
              0.500000449340584224, 0.166666301047928799, 0.0416606418736521605, 0.00833516176756213488,
              0.00141133124192407901, 0.000197416827502417545)
)  # fmt: skip
_DOUBLE = (
    -746.0, 711.0, 1.5 * 2**52, 0.72134752044448170368, 1.38629436111659742891788, 3.293189916579416256196886e-12, 1.0,
    0.499999999999998995, 0.166666666666668902, 0.0416666666667091133, 0.00833333333328077624, 0.00138888888829735555,
    0.000198412698838237981, 2.48015910647346619e-5, 2.75573040264266415e-6, 2.75561156347955458e-7,
    2.50544392303521494e-8, 2.10652229245517428e-9, 1.59752303065811533e-10,
)  # fmt: skip
NUMBERS = {np.dtype(np.float32): _SINGLE, np.dtype(np.float64): _DOUBLE}


def _exp(x, p):
    """exp(x) in at most 2 units in the last place, denormals too; 0 at -inf, inf at inf, NaN at NaN.

        exp(x) = 4^j exp(r)        j = round(x / ln 4)        r = x - j ln 4

    without a branch, so that loops over it run in vectors. For |r| <= ln 2 exp(r) is a polynomial near the minimax one,
    which errs by 2e-8 in float32 and 1.3e-17 in float64. ln 4 is subtracted in two parts, the first so short that j
    times it is exact.
    """
    raise NotImplementedError


@overload(_exp, jit_options={"fastmath": {"contract"}})
def _exp_of(x, p):
    def single(x, p):
        z = p[0] if x < p[0] else x
        z = p[1] if z > p[1] else z
        k = z * p[3] + p[2]
        j = k - p[2]
        r = (z - j * p[4]) - j * p[5]
        q = ((((p[12] * r + p[11]) * r + p[10]) * r + p[9]) * r + p[8]) * r + p[7]
        return _scaled((q * r + p[6]) * r + p[6], k)

    def double(x, p):
        z = p[0] if x < p[0] else x
        z = p[1] if z > p[1] else z
        k = z * p[3] + p[2]
        j = k - p[2]
        r = (z - j * p[4]) - j * p[5]
        q = ((((p[18] * r + p[17]) * r + p[16]) * r + p[15]) * r + p[14]) * r + p[13]
        q = (((((q * r + p[12]) * r + p[11]) * r + p[10]) * r + p[9]) * r + p[8]) * r + p[7]
        return _scaled((q * r + p[6]) * r + p[6], k)

    return single if x == types.float32 else double


@_jit
def exp(p, x, out):
    """out = exp(x), one axis: what the scan's decays are made with, for the tests."""
    _whole_vectors()
    for i in range(len(x)):
        out[i] = _exp(x[i], p)


@partial(_jit, flags=("contract", "reassoc"))
def dot(x, y, i, m):
    """The sum over c < m of x[i, c] y[c]."""
    total = x[i, 0] * y[0]
    for c in range(1, m):
        total += x[i, c] * y[c]
    return total


@_jit
def scan(p, first, stop, wide, step, u, dt, A, B, C, h, added_at, added, keep, kept, y, last, starts):
    """The items first..stop of `scan.scan`. A: (n, e). starts: (chunks or 0, b, n, e) the state before each chunk."""
    _whole_vectors()
    _, l, e = u.shape
    n = len(A)
    across = (e + wide - 1) // wide
    A_c, state = np.empty((n, wide), u.dtype), np.empty((n, wide), u.dtype)
    d, w, total = np.empty(wide, u.dtype), np.empty(wide, u.dtype), np.empty(wide, u.dtype)
    for item in range(first, stop):
        r, c0 = item // across, item % across * wide
        m = min(wide, e - c0)
        for i in range(n):
            for c in range(m):
                A_c[i, c] = A[i, c0 + c]
                state[i, c] = h[r, c0 + c, i]
        a = k = 0  # the next of added, of kept
        for t in range(l):
            if len(starts) and t % step == 0:
                for i in range(n):
                    for c in range(m):
                        starts[t // step, r, i, c0 + c] = state[i, c]
            for c in range(m):
                d[c] = dt[r, t, c0 + c]
                w[c] = d[c] * u[r, t, c0 + c]
                total[c] = 0
            plus = a < len(added_at) and added_at[a] == t
            for i in range(n):
                B_i, C_i = B[r, t, i], C[r, t, i]
                if plus:
                    for c in range(m):
                        state[i, c] = _exp(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i + added[r, a, c0 + c, i]
                        total[c] += C_i * state[i, c]
                else:
                    for c in range(m):
                        now = _exp(d[c] * A_c[i, c], p) * state[i, c] + w[c] * B_i
                        state[i, c] = now
                        total[c] += C_i * now
            for c in range(m):
                y[r, t, c0 + c] = total[c]
            a += plus
            if k < len(keep) and keep[k] == t:
                for c in range(m):
                    for i in range(n):
                        kept[r, k, c0 + c, i] = state[i, c]
                k += 1
        for c in range(m):
            for i in range(n):
                last[r, c0 + c, i] = state[i, c]


@_jit
def _difference(p, site, runs, begin, end, r, c0, m, A_c, u, dt, B, from_starts, state, decay, states, own, moved):
    """A chunk of a move's donor - base, at one site, into moved (tokens n, channels); row s n + i is of token s.

    u, dt, B, from_starts: of each of the runs, the donor and then the base; without the latter the base is the present
    run: `own` = (u, dt, B), with its `decay` and its `states`, of which row s n + i is before token s.
    """
    n = len(A_c)
    for run in range(runs):
        if site >= SSM_STATE:
            for i in range(n):
                for c in range(m):
                    state[i, c] = from_starts[run, r, i, c0 + c]
        for t in range(begin, end):
            for i in range(n):
                B_i, s = B[run, r, t, i], (t - begin) * n + i
                for c in range(m):
                    d = dt[run, r, t, c0 + c]
                    x = _exp(d * A_c[i, c], p)
                    if site != DECAY:
                        write = d * u[run, r, t, c0 + c] * B_i
                        now = x * state[i, c] + write
                        state[i, c] = now
                        x = write if site == STATE_WRITE else now
                    moved[s, c] = x if run == 0 else moved[s, c] - x
    if runs == 1:
        for t in range(begin, end):
            for i in range(n):
                B_i, s = own[2][r, t, i], (t - begin) * n + i
                for c in range(m):
                    if site == DECAY:
                        moved[s, c] -= decay[s, c]
                    elif site == STATE_WRITE:
                        moved[s, c] -= own[1][r, t, c0 + c] * own[0][r, t, c0 + c] * B_i
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
        for i in range(n):
            for c in range(m):
                A_c[i, c], dA_c[i, c], flow[i, c] = A[i, c0 + c], 0, dlast[r, c0 + c, i]
        a, k = len(added_at) - 1, len(keep) - 1
        for chunk in range(len(starts) - 1, -1, -1):
            begin = chunk * step
            end = min(begin + step, l)
            for i in range(n):
                for c in range(m):
                    states[i, c] = starts[chunk, r, i, c0 + c]
            a0 = a + 1
            while a0 > 0 and added_at[a0 - 1] >= begin:
                a0 -= 1
            for t in range(begin, end):  # the states again; row s n + i of `states` is before token s of the chunk
                for c in range(m):
                    d[c] = dt[r, t, c0 + c]
                    w[c] = d[c] * u[r, t, c0 + c]
                for i in range(n):
                    B_i, s = B[r, t, i], (t - begin) * n + i
                    for c in range(m):
                        x = _exp(d[c] * A_c[i, c], p)
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
                for c in range(m):
                    d[c] = dt[r, t, c0 + c]
                    w[c] = d[c] * u[r, t, c0 + c]
                    out[c] = dy[r, t, c0 + c]
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
                    du[r, t, c0 + c] = by_w[c] * d[c]
                    ddt[r, t, c0 + c] = by_d[c] + by_w[c] * u[r, t, c0 + c]
        for i in range(n):
            for c in range(m):
                dA[r, i, c0 + c] = dA_c[i, c]
        for c in range(m):
            for i in range(n):
                dh[r, c0 + c, i] = flow[i, c]


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
