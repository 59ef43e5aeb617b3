"""Sweeps: many edited runs of one prompt, of which nothing is computed twice.

`engine` runs any list of cells, `patch` makes the cells of a grid, `parts` names parts of a site, `grid` holds the
numbers, `logits` is what a metric is given.
"""

from .engine import Sweep, sweep
from .grid import Grid
from .parts import bands, groups
from .patch import patch_grid

__all__ = ["Grid", "Sweep", "bands", "groups", "patch_grid", "sweep"]
