"""Circuits: effects through single edges of the graph, and what is left of a model that keeps only some of them.

Reading order: `graph` (nodes and edges), `views` (a run in which each edge has a message of its own), `paths` (path
patching, edge attribution), `circuit` (pruning, faithfulness).
"""

from .circuit import Circuit, Faithfulness, faithfulness, prune
from .graph import Edge, edges
from .paths import EdgeEffects, edge_attribution, path_patch

__all__ = [
    "Circuit",
    "Edge",
    "EdgeEffects",
    "Faithfulness",
    "edge_attribution",
    "edges",
    "faithfulness",
    "path_patch",
    "prune",
]
