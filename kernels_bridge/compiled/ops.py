"""The backend's operations: those of `torch`, with compiled loops in the stretches that no edit touches (law 4)."""

from dataclasses import replace
from functools import partial

from minimal_mamba.scan import Ops

from .. import torch_ops
from .carry import carry
from .mixer import begin
from .scan import scan, taps

_OPS = Ops("compiled", partial(torch_ops.conv, taps=taps), partial(torch_ops.selective_scan, scan=scan), carry=carry)
COMPILED = replace(_OPS, begin=partial(begin, ops=_OPS))
