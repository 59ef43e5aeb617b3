"""fused: mamba-ssm's and causal-conv1d's kernels as a backend. `kernels` calls them, `virtual` builds what one scan
reads and writes of the state, `ops` says which edits need what.
"""

from .kernels import Kernels, load
from .ops import FUSED, make

__all__ = ["FUSED", "Kernels", "load", "make"]
