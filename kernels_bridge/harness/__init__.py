"""The equivalence harness: `python -m kernels_bridge check` and `bisect`.

`bounds` holds every bound and where it comes from, `draw` what the check runs on, `watch` how an implementation is seen
(ours by taps; `theirs`: other people's by hooks), `targets` those known by name, `operations` the conv and the scan
alone, `check` the whole, `first` where a target parts, `bisect` the first site at which any two implementations do.
"""

from .bisect import Bisection, bisect
from .check import KINDS, Blind, Report, check
from .first import localise
from .targets import reference, target
from .theirs import Theirs
from .watch import Implementation, Ours

__all__ = [
    "KINDS", "Bisection", "Blind", "Implementation", "Ours", "Report", "Theirs",
    "bisect", "check", "localise", "reference", "target",
]  # fmt: skip
