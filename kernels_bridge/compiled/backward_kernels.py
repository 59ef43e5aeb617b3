"""The loops of a whole mixer's backward: what lies between its matrix products and the scan's own backward.

Each runs rows first..stop. sizes: (b) real tokens of each row; on padding s and every gradient is 0.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload"
# numba gives the types

from .functions import _exp, _jit, _softplus, _whole_vectors


@_jit
def gate(p, first, stop, s, z, g, gated, dz):
    """Of gated = s SiLU(z), with g = dL/dgated: makes gated and dz, and g becomes ds. All (b, l, e)."""
    _whole_vectors()
    _, l, e = s.shape
    for r in range(first, stop):
        for t in range(l):
            s_t, z_t, g_t, gated_t, dz_t = s[r, t], z[r, t], g[r, t], gated[r, t], dz[r, t]
            for c in range(e):
                sigmoid = p[6] / (p[6] + _exp(-z_t[c], p))
                silu = z_t[c] * sigmoid
                dz_t[c] = g_t[c] * s_t[c] * (sigmoid + silu * (p[6] - sigmoid))
                gated_t[c] = s_t[c] * silu
                g_t[c] *= silu


@_jit
def step_sizes(p, first, stop, raw, bias, sizes, dt):
    """dt = softplus(raw + bias), 0 on padding; (b, l, e)."""
    _whole_vectors()
    e = raw.shape[2]
    for r in range(first, stop):
        for t in range(sizes[r]):
            raw_t, dt_t = raw[r, t], dt[r, t]
            for c in range(e):
                dt_t[c] = _softplus(raw_t[c] + bias[c], p)
        dt[r, sizes[r] :] = 0


@_jit
def step_sizes_and_skip(p, first, stop, raw, bias, ddt, u, ds, D, sizes, du, dbias, dD):
    """The backward of `step_sizes`, in the place of raw, and of s = y + D u, added to du; dbias, dD: (b, e)."""
    _whole_vectors()
    e = raw.shape[2]
    for r in range(first, stop):
        dbias_r, dD_r = dbias[r], dD[r]
        dbias_r[:] = 0
        dD_r[:] = 0
        for t in range(sizes[r]):
            raw_t, ddt_t, u_t, ds_t, du_t = raw[r, t], ddt[r, t], u[r, t], ds[r, t], du[r, t]
            for c in range(e):
                x = raw_t[c] + bias[c]
                draw = ddt_t[c] if x > 20 else ddt_t[c] / (p[6] + _exp(-x, p))  # beyond 20 `_softplus` is x itself
                raw_t[c] = draw
                dbias_r[c] += draw
                dD_r[c] += ds_t[c] * u_t[c]
                du_t[c] += ds_t[c] * D[c]
        raw[r, sizes[r] :] = 0


@_jit
def conv(p, first, stop, x, weight, bias, g, dx, dweight, dbias):
    """Of u = SiLU(c), c_t = bias + sum_i weight_i x_{t-k+1+i}, 0 before x, with g = dL/du: g becomes dL/dc.

    Args:
        x, g, dx: (b, l, e). weight: (k, e). dweight: (b, k, e). dbias: (b, e).
    """
    _whole_vectors()
    _, l, e = x.shape
    k = len(weight)
    for r in range(first, stop):
        dbias_r = dbias[r]
        dbias_r[:] = 0
        dweight[r] = 0
        for t in range(l - 1, -1, -1):
            g_t, dx_t = g[r, t], dx[r, t]
            for c in range(e):
                dx_t[c] = bias[c]
            since = max(0, k - 1 - t)
            for i in range(since, k):
                x_i, weight_i = x[r, t - k + 1 + i], weight[i]
                for c in range(e):
                    dx_t[c] += weight_i[c] * x_i[c]
            for c in range(e):
                sigmoid = p[6] / (p[6] + _exp(-dx_t[c], p))
                g_t[c] *= sigmoid + dx_t[c] * sigmoid * (p[6] - sigmoid)
                dbias_r[c] += g_t[c]
            for i in range(since, k):
                x_i, dweight_i = x[r, t - k + 1 + i], dweight[r, i]
                for c in range(e):
                    dweight_i[c] += g_t[c] * x_i[c]
            for c in range(e):
                dx_t[c] = weight[k - 1, c] * g_t[c]
            for j in range(1, min(k, l - t)):
                g_j, weight_j = g[r, t + j], weight[k - 1 - j]
                for c in range(e):
                    dx_t[c] += weight_j[c] * g_j[c]
