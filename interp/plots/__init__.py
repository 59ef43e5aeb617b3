"""Plots, one file a kind, each fit for a column of a paper. matplotlib loads when the first one is drawn."""

from .heatmap import heatmap

__all__ = ["heatmap"]
