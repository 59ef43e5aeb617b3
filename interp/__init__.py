"""interp: the front door. Name places with `at`, change them with edits, see what follows with `run`.

donor = run(model, clean_ids, record=[state := at.ssm_state(layer=3, pos=7)])
patched = run(model, corrupt_ids, edits=[Set(state, donor[state])])
effect = logit_diff(patched, answer, foil)  # nats, at each row's own last token
"""

from minimal_mamba import SITES, Add, Address, Apply, Edit, Mean, Project, Scale, Set, Zero, at

from .ablation import ablate, derangement, forget, freeze, mean_of, set_where
from .agreement import Agreement, agreement
from .alignment import Alignment, align
from .attention import Attention, Contributions, attention, contributions
from .attribution import attribution_grid
from .circuits import Circuit, Edge, EdgeEffects, Faithfulness, edge_attribution, edges, faithfulness, path_patch, prune
from .generation import generate
from .hooked import HookedMamba
from .knockout import Knockout, knockout, knockout_leak
from .knockout_grid import KnockoutGrid, knockout_grid
from .lens import DirectLogit, StateLens, direct_logit, logit_lens, state_lens
from .metrics import accuracy, kl, log_prob, logit_diff, prob
from .plots import (
    agreement_scatter,
    alignment_curve,
    attention_map,
    circuit,
    field_curves,
    half_life_curves,
    heatmap,
    knockout_map,
    lens_curve,
    lens_map,
    parts_bars,
    probe_curves,
    state_map,
    steering_plot,
)
from .probes import LinearProbe, ProbeGrid, collect, probe, probe_grid
from .relevance import Relevance, relevance
from .run import Gradients, Run, gradients, run
from .steering import Direction, SteeringCurve, contrast, steering_curve
from .store import load_edits, save_edits
from .swaps import Swapped
from .sweep import Grid, Sweep, load_grid, patch_grid, replay, sweep
from .timescales import (
    Flow,
    Rank,
    ReceptiveField,
    decay_bands,
    effective_rank,
    gradient_field,
    half_lives,
    mean_dt,
    receptive_field,
    state_flow,
    state_rank,
    typical_dt,
)
from .tuned_lens import TunedLens, tuned_lens

__all__ = [
    "SITES",
    "Add",
    "Address",
    "Agreement",
    "Alignment",
    "Apply",
    "Attention",
    "Circuit",
    "Contributions",
    "DirectLogit",
    "Direction",
    "Edge",
    "EdgeEffects",
    "Edit",
    "Faithfulness",
    "Flow",
    "Gradients",
    "Grid",
    "HookedMamba",
    "Knockout",
    "KnockoutGrid",
    "LinearProbe",
    "Mean",
    "ProbeGrid",
    "Project",
    "Rank",
    "ReceptiveField",
    "Relevance",
    "Run",
    "Scale",
    "Set",
    "StateLens",
    "SteeringCurve",
    "Swapped",
    "Sweep",
    "TunedLens",
    "Zero",
    "ablate",
    "accuracy",
    "agreement",
    "agreement_scatter",
    "align",
    "alignment_curve",
    "at",
    "attention",
    "attention_map",
    "attribution_grid",
    "circuit",
    "collect",
    "contrast",
    "contributions",
    "decay_bands",
    "derangement",
    "direct_logit",
    "edge_attribution",
    "edges",
    "effective_rank",
    "faithfulness",
    "field_curves",
    "forget",
    "freeze",
    "generate",
    "gradient_field",
    "gradients",
    "half_life_curves",
    "half_lives",
    "heatmap",
    "kl",
    "knockout",
    "knockout_grid",
    "knockout_leak",
    "knockout_map",
    "lens_curve",
    "lens_map",
    "load_edits",
    "load_grid",
    "log_prob",
    "logit_diff",
    "logit_lens",
    "mean_dt",
    "mean_of",
    "parts_bars",
    "patch_grid",
    "path_patch",
    "prob",
    "probe",
    "probe_curves",
    "probe_grid",
    "prune",
    "receptive_field",
    "relevance",
    "replay",
    "run",
    "save_edits",
    "set_where",
    "state_flow",
    "state_lens",
    "state_map",
    "state_rank",
    "steering_curve",
    "steering_plot",
    "sweep",
    "tuned_lens",
    "typical_dt",
]
