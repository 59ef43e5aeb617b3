"""The `compiled` backend: the scan and the convolution in loops that numba compiles for this processor.

`kernels` has the loops, `scan` their autograd, `ops` the backend. numba is imported when the first loop runs.
"""

from .ops import COMPILED

__all__ = ["COMPILED"]
