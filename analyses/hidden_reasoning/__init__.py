"""Hidden reasoning: what a Mamba carries in its state and its visible text does not show.

Reading order: `task` (what is computed), `tokenizer`, `loss`, `curriculum`; `settings`, `train` and `callbacks` (how a
model comes about), `evaluate` (how good it is), `organism` (the trained models that ship).

    python -m analyses.hidden_reasoning train --quick
    python -m analyses.hidden_reasoning evaluate
"""

from .evaluate import accuracy
from .organism import load_organism
from .task import MASKED, Batch, MaskedTask, Pairs, draw, pairs
from .tokenizer import WordTokenizer

__all__ = ["MASKED", "Batch", "MaskedTask", "Pairs", "WordTokenizer", "accuracy", "draw", "load_organism", "pairs"]
