"""Sweeps: many edited runs of one prompt, of which nothing is computed twice.

`engine` runs any list of cells, `patch` makes the cells of a grid, `parts` names parts of a site, `grid` holds the
numbers, `logits` is what a metric is given, `store` keeps a sweep on disk.
"""

from .engine import Sweep, sweep
from .grid import Grid
from .parts import bands, groups
from .patch import patch_grid
from .store import load_grid, replay

__all__ = ["Grid", "Sweep", "bands", "groups", "load_grid", "patch_grid", "replay", "sweep"]
