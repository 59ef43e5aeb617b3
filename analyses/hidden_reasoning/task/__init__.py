"""The tasks: rules, their text, pairs that differ in one operation, and what shortcuts can reach.

Reading order: `rules` (what is computed), `layout` (how it is written), `pairs`, `tokenizer`,
`spelling`, `shortcuts`.
"""

from .layout import DIRECT, DOUBLETHINK, MASKED, NONE, Batch, Task, compose, draw, held_out, text
from .pairs import Pairs, pairs
from .rules import OPERATIONS, Rules
from .spelling import check
from .tokenizer import HubTokenizer, Tokenizer, WordTokenizer, load_tokenizer

__all__ = [
    "DIRECT",
    "DOUBLETHINK",
    "MASKED",
    "NONE",
    "OPERATIONS",
    "Batch",
    "HubTokenizer",
    "Pairs",
    "Rules",
    "Task",
    "Tokenizer",
    "WordTokenizer",
    "check",
    "compose",
    "draw",
    "held_out",
    "load_tokenizer",
    "pairs",
    "text",
]
