"""The bounds of the check, all of them, each with where it comes from.

An *operation*, fed with reference inputs, stays within the tolerances that the kernels' own tests allow and, where the
arithmetic is float32 or wider, within a small error in norm. A *model* errs at most `FACTOR` times as much as the
readable model in the same type, plus a floor: rounding is what both may do, and no more than twice as much of it. So
does the error at the worst position, and in the worst channel of a gradient, with `WORST_FACTOR`.
"""

import torch
from torch import Tensor

# rtol, atol of torch.allclose. mamba_ssm tests/ops/test_selective_scan.py and causal_conv1d tests/test_causal_conv1d.py
# (mamba-ssm 2.3.2.post1, causal-conv1d 1.7.0). Upstream runs its scan tests in float32 only; the 16-bit figures are
# those that the same file names.
UPSTREAM: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "conv": {torch.float32: (3e-4, 1e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (1e-2, 5e-2)},
    "scan": {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)},
    # the loosest of a scan's gradients (ddelta); a conv's are those of its output or 1e-3
    "gradient": {torch.float32: (3e-3, 2e-2), torch.float16: (1.5e-2, 5e-2), torch.bfloat16: (1.5e-1, 5e-1)},
}

# Relative error in norm of one operation. The kernels are built with --use_fast_math, so float32 gets 1e-5; our own in
# float64 keep their last digits but for the order of sums. A 16-bit result is rounded once more at the end: 2^-9 and
# 2^-12 at most, with room for a second rounding. The type is that of the result: a state is float32 in every model.
OPERATION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

FACTOR = 2.0
WORST_FACTOR = 4.0  # that error is one draw of a maximum, which is the largest where a norm divides by little

# What a model may err beyond its factor, relative in norm. The readable model's error is one draw of a rounding that
# cancels more or less by luck, averaged least in short sequences; so the floor is what one operation may err, and in
# 16 bits four units in the last place.
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Relative change of the logits, in float64, that each negative control must make, else a fault in the scan could hide
# in the weights and no verdict is given. With transformers' own random weights the zeroed scan moves an eighth.
SEEN = {"the scan zeroed": 0.25, "no recurrence (decay 0)": 0.05, "B and C of one layer exchanged": 0.05}


def within(found: Tensor, true: Tensor, rtol: float, atol: float) -> bool:
    """The tests of the kernels ask for |found - true| <= atol + rtol |true|, everywhere."""
    return bool(((found - true).abs() <= atol + rtol * true.abs()).all())
