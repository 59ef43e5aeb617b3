"""Hidden reasoning: train the models, ask what they can, where the hidden value is, and draw what was found."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from minimal_mamba import Mamba
from minimal_mamba.errors import MambascopeError
from minimal_mamba.files import write_json

from .errors import TaskError, TrainingError
from .experiments.accuracy import Score, packed, score
from .organism import load_folder, load_settings, organism_folder, write_organism
from .task import Task, Tokenizer
from .training.settings import Settings, read_settings

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
QUICK = {
    "max_length": 3, "d_model": 32, "n_layer": 2, "d_state": 8, "batch_size": 32, "steps": 60, "warmup_steps": 6,
    "decay_steps": 12, "log_every": 20, "save_every": 60,
}  # fmt: skip
EVALUATION_SEED = 0


@app.command()
def train(
    task: Annotated[str | None, typer.Option(help="direct, masked or doublethink. [default: masked]")] = None,
    acts: Annotated[str | None, typer.Option(help="What the words do: arithmetic, or s5, the control.")] = None,
    modulus: Annotated[int | None, typer.Option(help="Of the arithmetic. [default: 5]")] = None,
    architecture: Annotated[str | None, typer.Option(help="mamba, or transformer: a GPT-2 of the same size.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="A Mamba checkpoint, of which --n-layer layers.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer of transformers. [default: our own]")] = None,
    loss: Annotated[str | None, typer.Option(help="weighted, reasoning or all.")] = None,
    answer_weight: Annotated[float | None, typer.Option(help="Of the final answer, in the weighted loss.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/<task>; --quick: none]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, to see that it works.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps; in the last fifth the learning rate falls.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest length to train on.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    n_layer: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    report_to: Annotated[str | None, typer.Option(help="Also log to tensorboard, wandb, ... as Trainer does.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Fresh prompts a length for the evaluation at the end.")] = 2000,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")] = None,
) -> None:
    """Train a model on a task; it ends by itself, with an evaluation and the folder `organism` in the run.

    A run that was stopped in any way goes on with --resume as if it had not been.
    """
    options: dict[str, Any] = {
        "task_name": task, "acts": acts, "modulus": modulus, "architecture": architecture, "pretrained": pretrained,
        "tokenizer": tokenizer, "loss": loss, "answer_weight": answer_weight, "seed": seed, "max_length": max_length,
        "batch_size": batch_size, "learning_rate": learning_rate, "d_model": d_model, "n_layer": n_layer,
        "report_to": report_to,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    with _plain_errors(), _folder(out, quick and not resume, task or "masked") as run:
        _set_up(device, threads)
        base = read_settings(run) if resume else Settings()
        settings = dataclasses.replace(base, **{**(QUICK if quick and not resume else {}), **given})
        if steps is not None and steps != settings.steps:
            settings = settings.with_steps(steps)
        model = _trainer()(settings, run, resume=resume, device=device)
        words = settings.load_tokenizer()
        n = min(prompts, 100) if quick else prompts
        found = _evaluate(model, range(1, settings.max_length + 1), n, EVALUATION_SEED, settings.task, words)
        folder = write_organism(run, model, words, settings, packed(found, EVALUATION_SEED))
        typer.echo(f"written: {folder}" if out or not quick else "a quick run is not kept; name a folder with --out")


@app.command()
def evaluate(
    model: Annotated[Path | None, typer.Option(help="Folder of an organism. [default: the one that ships]")] = None,
    max_length: Annotated[int, typer.Option(help="Lengths 1 to this one.")] = 12,
    prompts: Annotated[int, typer.Option(help="Fresh prompts a length.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="100 prompts a length.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the accuracies to this file, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")] = None,
) -> None:
    """Print how often the final answer is right on prompts that were held out, by length."""
    with _plain_errors():
        _set_up(device, threads)
        if max_length < 1:
            raise TaskError(f"--max-length {max_length}: a prompt has at least one step; give 1 or more.")
        folder = organism_folder("masked") if model is None else model
        organism, words = load_folder(folder)
        n = min(prompts, 100) if quick else prompts
        task = load_settings(folder).task
        found = _evaluate(organism.to(device), range(1, max_length + 1), n, seed, task, words)
        if out is not None:
            write_json(out, {"model": str(folder.name), **packed(found, seed)})


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
        from .experiments.patching import sweep, write

        _set_up("cpu", threads)
        n, num_steps = (min(n, 20), min(num_steps, 3)) if quick else (n, num_steps)
        if differ > num_steps:
            raise TaskError(f"--differ {differ}: a prompt of {num_steps} operations has operations 1..{num_steps}.")
        organism, _ = _mamba(organism_folder("masked") if model is None else model)
        found = sweep(organism, num_steps=num_steps, which_step=differ - 1, n=n, seed=seed)
        options = f"--pairs {n} --num-steps {num_steps} --differ {differ} --seed {seed}"
        said = write(out, organism, found, f"python -m analyses.hidden_reasoning demo {options}", seed)
        typer.echo("\n" + "\n\n".join(said) + f"\n\nFigures and results.json: {out}")


def _mamba(folder: Path) -> tuple[Mamba, Tokenizer]:
    model, tokenizer = load_folder(folder)
    if not isinstance(model, Mamba):
        raise TaskError(f"{folder} is a transformer, which has no state to patch or probe; give a Mamba.")
    return model, tokenizer


def _trainer() -> Callable[..., nn.Module]:
    try:
        from .training.train import train as train_model  # transformers takes seconds to import
    except ModuleNotFoundError as error:
        raise TrainingError(f"training needs {error.name}: pip install 'mambascope[train]'.") from None
    return train_model


def _evaluate(
    model: nn.Module, lengths: Sequence[int], prompts: int, seed: int, task: Task, tokenizer: Tokenizer
) -> dict[int, Score]:
    found = {}
    typer.echo(f"exact final answers on at most {prompts} prompts a length; chance is {1 / task.modulus:.0%}")
    for length in lengths:
        found[length] = one = score(model, length, prompts, seed, task=task, tokenizer=tokenizer, written=True)
        alone = "" if one.written is None else f"  written whole {one.written / one.prompts:7.2%}"
        said = f"{'█' * round(40 * one.share):40}  {one.share:7.2%} of {one.prompts}{alone}"
        typer.echo(f"  {length:2d}  {said}{'  (may be trained on)' if one.seen else ''}")
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
def _folder(out: Path | None, temporary: bool, name: str) -> Iterator[Path]:
    if out is None and temporary:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "run"
    else:
        yield out or Path("runs") / name


if __name__ == "__main__":
    app()
