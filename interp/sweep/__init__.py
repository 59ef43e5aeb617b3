"""Sweeps: many edited runs of one prompt, of which nothing is computed twice.

`engine` runs any list of cells: `base` is what all have in common, `batch` a group of them that runs together. `patch`
makes the cells of a grid, `parts` names parts of a site, `grid` holds the numbers. `store` keeps a sweep on disk,
`functions` says what the functions in it are known by.
"""

from .engine import Sweep, sweep
from .grid import Grid
from .parts import bands, groups
from .patch import patch_grid
from .store import load_grid, replay

__all__ = ["Grid", "Sweep", "bands", "groups", "load_grid", "patch_grid", "replay", "sweep"]
