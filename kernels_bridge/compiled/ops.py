"""The backend's operations: those of `torch`, with compiled loops in the stretches that no edit touches (law 4)."""

from functools import partial

from minimal_mamba.scan import Ops

from .. import torch_ops
from .scan import scan, taps

COMPILED = Ops("compiled", partial(torch_ops.conv, taps=taps), partial(torch_ops.selective_scan, scan=scan))
