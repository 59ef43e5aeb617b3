"""Plots, one file a kind, each fit for a column of a paper. matplotlib loads when the first one is drawn."""

from .alignment import alignment_curve
from .attention import attention_map, knockout_map
from .attribution import agreement_scatter
from .circuit import circuit
from .heatmap import heatmap
from .lens import lens_map, parts_bars, state_map
from .probes import probe_curves
from .steering import steering_plot
from .timescales import field_curves, half_life_curves
from .tuned_lens import lens_curve

__all__ = [
    "agreement_scatter",
    "alignment_curve",
    "attention_map",
    "circuit",
    "field_curves",
    "half_life_curves",
    "heatmap",
    "knockout_map",
    "lens_curve",
    "lens_map",
    "parts_bars",
    "probe_curves",
    "state_map",
    "steering_plot",
]
