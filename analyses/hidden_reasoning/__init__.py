"""Hidden reasoning: does a Mamba carry in its state a value that its visible text does not show?

Reading order: `task` (what is computed), `tokenizer`, `loss`, `curriculum`; `settings` and `train` (how a model comes about),
`evaluate` (how good it is), `organism` (the trained models that ship).

    python -m analyses.hidden_reasoning train --quick
    python -m analyses.hidden_reasoning evaluate
"""

from .evaluate import accuracy
from .organism import load_organism
from .task import MASKED, Batch, MaskedTask, Pairs, draw, pairs
from .tokenizer import WordTokenizer

__all__ = ["MASKED", "Batch", "MaskedTask", "Pairs", "WordTokenizer", "accuracy", "draw", "load_organism", "pairs"]
