"""The `compiled` backend: the scan, the convolution, the single step in loops that numba compiles for this processor.

`kernels` and `token_kernels` have the loops, `scan` the autograd of those that have one, `layer` the others, `ops` the
backend. numba is imported when the first loop runs. On a machine the first forward of a type compiles for 2 to 3 s, the
first backward for 4 to 6, the first token alone for 3; later processes load them in 0.4 s.

Why numba: one layer's scan (batch 8, length 256, 256 channels of 16 states, one core) takes 13 ms in plain PyTorch, 3.5
in these loops, 2.7 in C (gcc -O3) and about as much in a torch.compile of fixed chunks, which takes 18 s to compile;
both of these need a C compiler where the model runs, this a wheel.
"""

from .ops import COMPILED

__all__ = ["COMPILED"]
