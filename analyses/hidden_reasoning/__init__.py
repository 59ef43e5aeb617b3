"""Hidden reasoning: what a Mamba carries in its state and its visible text does not show.

Reading order: `task` (what is computed, and what shortcuts can reach), `training` (how a model comes about), `organism`
(the trained models that ship), `experiments` (what is asked of them).

    python -m analyses.hidden_reasoning --help
"""

from .experiments.accuracy import Score, score
from .organism import load_organism
from .task import DIRECT, DOUBLETHINK, MASKED, Batch, Pairs, Task, WordTokenizer, draw, pairs

__all__ = [
    "DIRECT",
    "DOUBLETHINK",
    "MASKED",
    "Batch",
    "Pairs",
    "Score",
    "Task",
    "WordTokenizer",
    "draw",
    "load_organism",
    "pairs",
    "score",
]
