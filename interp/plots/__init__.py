"""Plots, one file a kind, each fit for a column of a paper. matplotlib loads when the first one is drawn."""

from .heatmap import heatmap
from .probes import probe_curves

__all__ = ["heatmap", "probe_curves"]
