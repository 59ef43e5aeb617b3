"""What the compiled loops are made of: how they are compiled, exp, 2^x, softplus and SiLU, in vectors.

`contract` lets a product and a sum be one rounding. `reassoc` is allowed in `dot` alone, so that its sum runs in
vectors: an order that is fixed when it is compiled for a processor. No flag lets the compiler take NaN or infinity for
impossible. numba keeps what it compiled beside each file and does not see that this one has changed: after an edit
here, remove the *.nbi files.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, call-overload, var-annotated"
# numba gives the types

from functools import partial

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload


def _jit(function, flags=("contract",)):
    how = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    try:
        return njit(function, cache=True, **how)  # compiled once on a machine
    except RuntimeError:  # no folder that it may write to: once a process
        return njit(function, **how)


@intrinsic
def _power(context, k):
    """2^j of k = j + 1.5 2^52 (of float32, 2^23): the last bits of k are j, which becomes an exponent."""
    bits, bias, fraction = (32, 127, 23) if k == types.float32 else (64, 1023, 52)

    def build(context, builder, signature, args):
        (k,), integer = args, ir.IntType(bits)
        j = builder.shl(builder.bitcast(k, integer), ir.Constant(integer, fraction))
        return builder.bitcast(builder.add(j, ir.Constant(integer, bias << fraction)), k.type)

    return k(k), build


@intrinsic
def _whole_vectors(context):
    """LLVM uses all 512 bits where a processor has them; of itself it takes half on most of Intel's."""

    def build(context, builder, signature, args):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add knows few names
        return context.get_dummy_value()

    return types.none(), build


@intrinsic
def _turn_square(context, source, i, c, into):
    """into[c + k, i : i + 16] = source[i : i + 16, c + k] for k < 16, in registers; last axes are contiguous.

    Four times the rows of one half are woven into those of the other: a transposition.
    """

    def build(context, builder, signature, args):
        (source, *_, into), (array, i, c, other) = (signature.args, args)
        vector, index = ir.VectorType(context.get_data_type(source.dtype), 16), ir.IntType(32)
        size = context.get_abi_sizeof(vector.element)

        def row(kind, array, *where):
            made = context.make_array(kind)(context, builder, array)
            place = cgutils.get_item_pointer(context, builder, kind, made, where)
            return builder.bitcast(place, ir.PointerType(vector))

        rows = [builder.load(row(source, array, builder.add(i, i.type(k)), c), align=size) for k in range(16)]
        halves = [[half + x for k in range(8) for x in (k, k + 16)] for half in (0, 8)]
        weave = [ir.Constant(ir.VectorType(index, 16), [index(x) for x in half]) for half in halves]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[k], rows[k + 8], half) for k in range(8) for half in weave]
        for k, turned in enumerate(rows):
            builder.store(turned, row(into, other, builder.add(c, c.type(k)), i), align=size)
        return context.get_dummy_value()

    return types.none(source, types.intp, types.intp, into), build


@_jit
def turn(source, into):
    """into[c, i] = source[i, c]; `into` may be larger, and last axes are contiguous."""
    rows, columns = source.shape
    squares, wide = rows // 16 * 16, columns // 16 * 16
    for i in range(0, squares, 16):
        for c in range(0, wide, 16):
            _turn_square(source, i, c, into)
    for c in range(columns):
        for i in range(squares if c < wide else 0, rows):
            into[c, i] = source[i, c]


# The numbers of `_exp`: bounds beyond which all is 0 or inf, 1.5 2^23 or 2^52, 1 / ln 4, ln 4 in two parts, and the
# polynomial's coefficients from r^2 up. Then those of `_exp2`: bounds, and coefficients from f up; last 1 / ln 2 and
# ln 2. They are arguments of the loops: of constants LLVM reads each from memory anew.
_SINGLE = tuple(
    np.float32(c)
    for c in (-104, 90, 1.5 * 2**23, 0.72134752044448170, 1.38629150390625, 2.8572136406188344642e-6, 1.0,
              0.500000449340584224, 0.166666301047928799, 0.0416606418736521605, 0.00833516176756213488,
              0.00141133124192407901, 0.000197416827502417545,
              -127.0, 128.0, 0.6931471824645996, 0.24022650718688965, 0.055503569543361664, 0.009618083015084267,
              0.0013390863314270973, 0.00015453163359779865,
              1.4426950408889634, 0.6931471805599453)
)  # fmt: skip
_DOUBLE = (
    -746.0, 711.0, 1.5 * 2**52, 0.72134752044448170368, 1.38629436111659742891788, 3.293189916579416256196886e-12, 1.0,
    0.499999999999998995, 0.166666666666668902, 0.0416666666667091133, 0.00833333333328077624, 0.00138888888829735555,
    0.000198412698838237981, 2.48015910647346619e-5, 2.75573040264266415e-6, 2.75561156347955458e-7,
    2.50544392303521494e-8, 2.10652229245517428e-9, 1.59752303065811533e-10,
    -1023.0, 1024.0, 0.6931471805599453, 0.24022650695910097, 0.0555041086648216, 0.009618129107606888,
    0.0013333558146416936, 0.0001540353044173605, 1.525273382983612e-05, 1.321544258792169e-06, 1.0178062445845774e-07,
    7.072585949269223e-09, 4.4549605981865186e-10,
    1.4426950408889634, 0.6931471805599453,
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
        power = _power(k)
        return ((q * r + p[6]) * r + p[6]) * power * power  # the first is exact, the second rounds denormals

    def double(x, p):
        z = p[0] if x < p[0] else x
        z = p[1] if z > p[1] else z
        k = z * p[3] + p[2]
        j = k - p[2]
        r = (z - j * p[4]) - j * p[5]
        q = ((((p[18] * r + p[17]) * r + p[16]) * r + p[15]) * r + p[14]) * r + p[13]
        q = (((((q * r + p[12]) * r + p[11]) * r + p[10]) * r + p[9]) * r + p[8]) * r + p[7]
        power = _power(k)
        return ((q * r + p[6]) * r + p[6]) * power * power

    return single if x == types.float32 else double


def _exp2(t, p):
    """2^t in at most 2 units in the last place, where that is a normal number; inf at inf, NaN at NaN.

        2^t = 2^j 2^f        j = round(t)        f = t - j

    The decay exp(dt A) of a step is 2^(dt (A / ln 2)), a quarter cheaper than `_exp`: A / ln 2 is made once. It errs by
    |dt A| units more, as an exp of the rounded product dt A does anyhow. For |f| <= 1/2 the polynomial errs by 9e-9 in
    float32 and 2e-17 in float64. What is smaller than a normal number may be 0, and from half a power below the largest
    on it is inf.
    """
    raise NotImplementedError


@overload(_exp2, jit_options={"fastmath": {"contract"}})
def _exp2_of(t, p):
    def single(t, p):
        z = p[13] if t < p[13] else t
        z = p[14] if z > p[14] else z
        k = z + p[2]
        f = z - (k - p[2])
        q = (((((p[20] * f + p[19]) * f + p[18]) * f + p[17]) * f + p[16]) * f + p[15]) * f + p[6]
        return q * _power(k)

    def double(t, p):
        z = p[19] if t < p[19] else t
        z = p[20] if z > p[20] else z
        k = z + p[2]
        f = z - (k - p[2])
        q = ((((p[31] * f + p[30]) * f + p[29]) * f + p[28]) * f + p[27]) * f + p[26]
        q = (((((q * f + p[25]) * f + p[24]) * f + p[23]) * f + p[22]) * f + p[21]) * f + p[6]
        return q * _power(k)

    return single if t == types.float32 else double


def _softplus(x, p):
    """log(1 + exp(x)) in at most 4 units in the last place; beyond 20 x itself, as torch has it; NaN at NaN.

        log(1 + exp(x)) = max(x, 0) + 2 artanh(s)        s = t / (2 + t)        t = exp(-|x|)

    without a branch. The series artanh s = s (1 + s^2 / 3 + s^4 / 5 ...), where s <= 1/3, ends with a term below the
    last place: 8 of them in float32, 17 in float64.
    """
    raise NotImplementedError


@overload(_softplus, jit_options={"fastmath": {"contract"}})
def _softplus_of(x, p):
    dtype, terms = (np.float32, 8) if x == types.float32 else (np.float64, 17)
    series = tuple(dtype(1 / (2 * k + 1)) for k in range(terms))
    zero, two = dtype(0), dtype(2)

    def softplus(x, p):
        t = _exp(-abs(x), p)
        s = t / (two + t)
        total = series[terms - 1]
        for k in range(terms - 2, -1, -1):
            total = total * (s * s) + series[k]
        return x if x > 20 else (x if x > 0 else zero) + two * s * total

    return softplus


@_jit
def _silu(x, p):
    return x / (p[6] + _exp(-x, p))


@_jit
def exp(p, x, out):
    """out = exp(x), one axis, for the tests."""
    _whole_vectors()
    for i in range(len(x)):
        out[i] = _exp(x[i], p)


@_jit
def exp2(p, x, out):
    """out = 2^x, one axis: what the scan's decays are made with, for the tests."""
    _whole_vectors()
    for i in range(len(x)):
        out[i] = _exp2(x[i], p)


@_jit
def softplus(p, x, out):
    """out = log(1 + exp(x)), one axis: what the step sizes are made with, for the tests."""
    _whole_vectors()
    for i in range(len(x)):
        out[i] = _softplus(x[i], p)


@partial(_jit, flags=("contract", "reassoc"))
def dot(x, y, i, m):
    """The sum over c < m of x[i, c] y[c]."""
    total = x[i, 0] * y[0]
    for c in range(1, m):
        total += x[i, c] * y[c]
    return total
