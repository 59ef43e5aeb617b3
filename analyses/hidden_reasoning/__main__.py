"""`python -m analyses.hidden_reasoning demo|train|evaluate`: patch the model that ships, train one, test one."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from minimal_mamba import Mamba
from minimal_mamba.errors import MambascopeError
from minimal_mamba.files import write_json

from .errors import TaskError, TrainingError
from .evaluate import accuracy
from .organism import load_folder, load_settings, organism_folder, write_organism
from .settings import Settings, read_settings
from .task import MaskedTask

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
QUICK = Settings(
    max_length=3, d_model=32, n_layer=2, d_state=8, batch_size=32, steps=60, warmup_steps=6, decay_steps=12,
    log_every=20, save_every=60,
)  # fmt: skip
EVALUATION_SEED = 0


@app.command()
def train(
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/masked; --quick: none]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, to see that it works.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps; in the last fifth the learning rate falls.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest length to train on.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    n_layer: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Fresh prompts a length for the evaluation at the end.")] = 2000,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")] = None,
) -> None:
    """Train a model on the `masked` task; it ends by itself, with an evaluation and the folder `organism` in the run.

    A run that was stopped in any way goes on with --resume as if it had not been.
    """
    given = {
        "seed": seed, "max_length": max_length, "batch_size": batch_size, "learning_rate": learning_rate,
        "d_model": d_model, "n_layer": n_layer,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with _plain_errors(), _folder(out, quick and not resume) as run:
        _set_up(device, threads)
        base = read_settings(run) if resume else QUICK if quick else Settings()
        settings = dataclasses.replace(base, **given)  # type: ignore[arg-type]
        if steps is not None and steps != settings.steps:
            settings = settings.with_steps(steps)
        train_model = _trainer()
        model = train_model(settings, run, resume=resume, device=device)
        n = min(prompts, 100) if quick else prompts
        found = _evaluate(model, range(1, settings.max_length + 1), n, EVALUATION_SEED, settings.task)
        folder = write_organism(run, model, settings, found, n, EVALUATION_SEED)
        typer.echo(f"written: {folder}" if out or not quick else "a quick run is not kept; name a folder with --out")


@app.command()
def evaluate(
    model: Annotated[Path | None, typer.Option(help="Folder of an organism. [default: the one that ships]")] = None,
    max_length: Annotated[int, typer.Option(help="Lengths 1 to this one.")] = 8,
    prompts: Annotated[int, typer.Option(help="Fresh hidden prompts a length.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="100 prompts a length.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the accuracies to this file, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")] = None,
) -> None:
    """Print how often the final answer is right on fresh hidden prompts, by length."""
    with _plain_errors():
        _set_up(device, threads)
        if max_length < 1:
            raise TaskError(f"--max-length {max_length}: a prompt has at least one step; give 1 or more.")
        folder = organism_folder("masked") if model is None else model
        organism, _ = load_folder(folder)
        n = min(prompts, 100) if quick else prompts
        found = _evaluate(organism.to(device), range(1, max_length + 1), n, seed, load_settings(folder).task)
        if out is not None:
            write_json(out, {"model": str(folder.name), "prompts": n, "seed": seed, "accuracy": found})


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of an organism. [default: the one that ships]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures and results.json.")] = Path("runs/demo"),
    n: Annotated[int, typer.Option("--pairs", min=2, help="Pairs of prompts.")] = 200,
    num_steps: Annotated[int, typer.Option(help="Operations of a prompt.")] = 6,
    differ: Annotated[int, typer.Option(min=1, help="The operation in which a pair differs, from 1.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the pairs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="20 pairs of 3 operations.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; for a model this small more gain little.")] = 1,
) -> None:
    """Patch the SSM state over all layers and positions, draw it, and say in three sentences what it shows."""
    with _plain_errors():
        from .patching import sweep, write

        _set_up("cpu", threads)
        n, num_steps = (min(n, 20), min(num_steps, 3)) if quick else (n, num_steps)
        if differ > num_steps:
            raise TaskError(f"--differ {differ}: a prompt of {num_steps} operations has operations 1..{num_steps}.")
        organism, _ = load_folder(organism_folder("masked") if model is None else model)
        found = sweep(organism, num_steps=num_steps, which_step=differ - 1, n=n, seed=seed)
        options = f"--pairs {n} --num-steps {num_steps} --differ {differ} --seed {seed}"
        said = write(out, organism, found, f"python -m analyses.hidden_reasoning demo {options}", seed)
        typer.echo("\n" + "\n\n".join(said) + f"\n\nFigures and results.json: {out}")


def _trainer() -> Callable[..., Mamba]:
    try:
        from .train import train as train_model  # transformers takes seconds to import
    except ModuleNotFoundError as error:
        raise TrainingError(f"training needs {error.name}: pip install 'mambascope[train]'.") from None
    return train_model


def _evaluate(model: Mamba, lengths: range, prompts: int, seed: int, task: MaskedTask) -> dict[int, float]:
    found = {}
    typer.echo(f"exact final answers on {prompts} fresh hidden prompts a length; chance is {1 / task.modulus:.0%}")
    for length in lengths:
        found[length] = accuracy(model, length, prompts, seed, task=task)
        typer.echo(f"  {length:2d}  {'█' * round(40 * found[length]):40}  {found[length]:7.2%}")
    return found


def _set_up(device: str, threads: int | None) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise TrainingError(f"--device {device} cannot be used here ({why}); leave it out for cpu.") from None


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What goes wrong in ways that we foresee is said in a sentence."""
    try:
        yield
    except (MambascopeError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Stopped. A training goes on from its last checkpoint with --resume.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _folder(out: Path | None, temporary: bool) -> Iterator[Path]:
    if out is None and temporary:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "run"
    else:
        yield out or Path("runs/masked")


if __name__ == "__main__":
    app()
