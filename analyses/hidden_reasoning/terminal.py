"""What the commands print of accuracy: a line a length, beside the best shortcut's."""

from collections.abc import Callable, Iterable

import typer

from .errors import TaskError
from .experiments.accuracy import NoneHeldOut, Score
from .task import Task
from .task.shortcuts import bounds


def shown(task: Task, lengths: Iterable[int], ask: Callable[[int], Score], beside: bool = True) -> dict[int, Score]:
    """Ask at each length and print what came of it; a length of which no prompt was held out is left out."""
    lengths, found = list(lengths), {}
    best = _shortcuts(task, max(lengths)) if beside else {}
    for length in lengths:
        try:
            found[length] = ask(length)
            typer.echo(line(length, found[length], best.get(length)))
        except NoneHeldOut as error:
            typer.echo(f"  {length:2d}  {error}")
    return found


def line(length: int, found: Score, shortcut: float | None = None) -> str:
    """One length's score, as the terminal shows it, beside the best shortcut's."""
    alone = "" if found.written is None else f"  written whole {found.written / found.prompts:7.2%}"
    bar = f"{'█' * round(40 * found.share):40}  {found.share:7.2%} of {found.prompts}{alone}"
    beside = "" if shortcut is None else f"  best shortcut {shortcut:4.0%}"
    return f"  {length:2d}  {bar}{beside}{'  (may be trained on)' if found.seen else ''}"


def _shortcuts(task: Task, max_length: int) -> dict[int, float]:
    """The best shortcut's accuracy by length; none where they are too many to list."""
    try:
        found = bounds(task, range(1, max_length + 1)).values()
    except TaskError:
        return {}
    return {n: max(share[n] for share in found) for n in range(1, max_length + 1)}
