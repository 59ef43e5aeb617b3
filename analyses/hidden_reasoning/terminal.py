"""What commands share: threads and device, errors in a sentence, and accuracy, a line a length, beside shortcuts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import typer

from minimal_mamba.errors import MambascopeError

from .errors import TaskError, TrainingError
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


def set_up(device: str, threads: int | None) -> None:
    """Set the threads, and see that there is such a device."""
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise TrainingError(f"--device {device} cannot be used here ({why}); leave it out for cpu.") from None


@contextmanager
def plain_errors() -> Iterator[None]:
    """What goes wrong in ways that we foresee is said in a sentence."""
    try:
        yield
    except (MambascopeError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. What is in the results file is kept; a training goes on with --resume.", err=True)
        raise typer.Exit(130) from None
