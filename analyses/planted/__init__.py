"""Models built by hand whose circuits are known exactly, and how well each method finds them."""

from .models import MODELS, plant
from .truth import Flow, Planted, Truth

__all__ = ["MODELS", "Flow", "Planted", "Truth", "plant"]
