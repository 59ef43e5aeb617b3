"""The backend's operations: those of `torch`, with compiled loops in the stretches that no edit touches (law 4)."""

from functools import partial

from minimal_mamba.scan import Ops

from .. import torch_ops
from .layer import add_norm, step
from .scan import scan, taps

CONV, SCAN = partial(torch_ops.conv, taps=taps), partial(torch_ops.selective_scan, scan=scan)
COMPILED = Ops("compiled", CONV, SCAN, step=step, add_norm=add_norm)
