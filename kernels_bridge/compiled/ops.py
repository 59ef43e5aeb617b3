"""The backend's operations: those of `torch`, with compiled loops in the stretches that no edit touches (law 4)."""

from dataclasses import replace
from functools import partial

from minimal_mamba.scan import Ops

from .. import torch_ops
from .carry import carry
from .layer import add_norm, step
from .mixer import begin
from .scan import scan, taps

CONV, SCAN = partial(torch_ops.conv, taps=taps), partial(torch_ops.selective_scan, scan=scan)
_OPS = Ops("compiled", CONV, SCAN, step=step, add_norm=add_norm, carry=carry)
COMPILED = replace(_OPS, begin=partial(begin, ops=_OPS))
