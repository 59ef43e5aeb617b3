"""The `compiled` backend: the scan, the convolution, the single step in loops that numba compiles for this processor.

`kernels` has the loops of the scan and the conv, `scan` their autograd; `mixer` runs a whole mixer where nothing in it
is touched but states are recorded, with loops of `mixer_kernels`, and in training `mixer_backward` its gradients, with
those of `backward_kernels`; `layer` the norm between two layers and a mixer's single step, with those of
`token_kernels`; `functions` is what the loops are made of, `loop` runs them on threads, and `ops` is the backend. numba
is imported when the first loop runs. On a machine the first forward of a type compiles for 4 s, the first with edits
for 2 more, the first backward for 5, the first token alone for 3; later processes load them in 0.4 s. A layer in which
other sites are recorded runs line by line, and so do gradients of a model in evaluation mode: the same numbers, not to
the last bit.

Why numba: one layer's scan (batch 8, length 256, 256 channels of 16 states, one core) takes 13 ms in plain PyTorch, 2
in these loops, 2.7 in C (gcc -O3) and about as much in a torch.compile of fixed chunks, which takes 18 s to compile;
both of these need a C compiler where the model runs, this a wheel.
"""

from .ops import COMPILED

__all__ = ["COMPILED"]
