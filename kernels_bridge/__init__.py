"""kernels_bridge: the computation of `minimal_mamba` on fast paths.

`backends` is the table of what can run here; `torch_ops` gives law 4 (fast stretches, readable steps where an edit
touches), `torch_scan` the scan of a stretch, `step` a single token, `carry` what a changed state does to later
tokens, `compiled` the same in loops that numba compiles, on the `threads` that torch has, and `fused` the backend on
mamba-ssm's kernels.
`python -m kernels_bridge backends` prints the table, `check` and `bisect` (the package `harness`) prove that the paths
compute the same.
"""

from .backends import BACKENDS, Backend, resolve, table

__all__ = ["BACKENDS", "Backend", "resolve", "table"]
