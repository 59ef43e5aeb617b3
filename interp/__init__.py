"""interp: the front door. Name places with `at`, change them with edits, see what follows with `run`.

donor = run(model, clean_ids, record=[state := at.ssm_state(layer=3, pos=7)])
patched = run(model, corrupt_ids, edits=[Set(state, donor[state])])
effect = logit_diff(patched, answer, foil)  # nats, at each row's own last token
"""

from minimal_mamba import SITES, Add, Address, Apply, Edit, Mean, Project, Scale, Set, Zero, at

from .metrics import accuracy, kl, log_prob, logit_diff, prob
from .plots import heatmap
from .run import Gradients, Run, generate, gradients, run
from .store import load_edits, save_edits
from .sweep import Grid, patch_grid
from .timescales import decay_bands, half_lives, typical_dt

__all__ = [
    "SITES",
    "Add",
    "Address",
    "Apply",
    "Edit",
    "Gradients",
    "Grid",
    "Mean",
    "Project",
    "Run",
    "Scale",
    "Set",
    "Zero",
    "accuracy",
    "at",
    "decay_bands",
    "generate",
    "gradients",
    "half_lives",
    "heatmap",
    "kl",
    "load_edits",
    "log_prob",
    "logit_diff",
    "patch_grid",
    "prob",
    "run",
    "save_edits",
    "typical_dt",
]
