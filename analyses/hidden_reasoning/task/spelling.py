"""The ids of a task's words under a tokenizer, each of which must be one token."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TokenizerError
from .rules import Ints
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .layout import Task


@dataclass(frozen=True, eq=False)
class Spelling:
    """Token ids; -1 of a word that the task has not.

    Args:
        value: (modulus,) of " 0", " 1", ... first: (modulus,) of a value that begins a line. operation: (operations,).
    """

    value: Ints
    first: Ints
    operation: Ints
    show: int
    hide: int
    newline: int
    blank: int
    pad: int


@lru_cache(maxsize=16)
def spell(task: "Task", tokenizer: Tokenizer) -> Spelling:
    """Look up every word of a task.

    Raises:
        TokenizerError: words that are not one token, all of them listed.
    """
    broken: list[str] = []

    def id_of(word: str, used: bool = True) -> int:
        ids = tokenizer.encode(word) if used else [-1]
        if len(ids) != 1:
            broken.append(f"{word!r} is {[tokenizer.decode([i]) for i in ids]}")
        return ids[0] if ids else -1

    masked, lines = task.name == "masked", task.name != "direct"
    found = Spelling(
        np.array([id_of(f" {v}") for v in range(task.modulus)]),
        np.array([id_of(str(v), masked and v == task.start) for v in range(task.modulus)]),
        np.array([id_of(f" {name}") for name in task.operations]),
        id_of("show", masked), id_of("hide", masked), id_of("\n", lines), id_of(" _", masked), tokenizer.pad_id,
    )  # fmt: skip
    if broken:
        raise TokenizerError(
            f"the words of {task.name} are one token each; this tokenizer splits some: {'; '.join(broken)}. Leave "
            "these operations out, or take the study's own tokenizer."
        )
    return found


def check(task: "Task", tokenizer: Tokenizer) -> None:
    """See that a tokenizer makes of whole rows what the task's layout says: of the reasoning 1 + 2 num_steps tokens.

    Raises:
        TokenizerError: it splits words, or joins them.
    """
    from .layout import compose, text

    names = [*task.operations, *reversed(task.operations)]
    for steps in (1, len(names)):
        for concealed in (True, False):
            operations = [task.operations.index(name) for name in names[:steps]]
            row = compose([operations], steps, concealed=concealed, task=task, tokenizer=tokenizer)
            expected, got = row.ids[0].tolist(), tokenizer.encode(text(task, names[:steps], concealed))
            if got != expected:
                at = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))  # noqa: B905
                raise TokenizerError(
                    f"a row of {task.name} with {steps} steps has {len(expected)} tokens; this tokenizer makes "
                    f"{len(got)} of it and parts from the words at {tokenizer.decode(expected[at : at + 3])!r}, which "
                    f"it reads as {tokenizer.decode(got[at : at + 3])!r}. It joins words that the task keeps "
                    "apart; take another, or the study's own."
                )
