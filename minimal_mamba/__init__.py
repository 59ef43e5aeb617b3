"""minimal_mamba: Mamba-1, readable, with every inner quantity open to reading and editing.

Reading order: `sites` (the places), `scan` (the two recurrences), `block` (one layer), `model` (the whole): that is
Mamba. Then `address` and `edits` (what a run is asked to read and change), `tap` (how the forward offers each site),
`plan` and `item` (how one run meets its edits), `config`, `checkpoint` and `files` (what comes from and goes to disk).

Axes: `b` batch, `l` position, `d` d_model, `e` d_inner, `n` d_state, `r` dt_rank, `k` d_conv, `v` vocabulary.

Paper (Gu & Dao 2023, arXiv:2312.00752) and code: h_t `ssm_state`, x_t `u`, Delta `dt`, A-bar `decay`, B-bar x_t
`state_write`, with B-bar = Delta B as in the authors' code.
"""

from .address import Address, at
from .config import MambaConfig
from .edits import Add, Apply, Edit, Mean, Project, Scale, Set, Zero
from .errors import MambascopeError
from .model import Mamba, MambaOutput, MambaState
from .plan import Plan
from .scan import READABLE, Ops
from .sites import SITES
from .tap import NO_TAP, Tap

__all__ = [
    "NO_TAP",
    "READABLE",
    "SITES",
    "Add",
    "Address",
    "Apply",
    "Edit",
    "Mamba",
    "MambaConfig",
    "MambaOutput",
    "MambaState",
    "MambascopeError",
    "Mean",
    "Ops",
    "Plan",
    "Project",
    "Scale",
    "Set",
    "Tap",
    "Zero",
    "at",
]
