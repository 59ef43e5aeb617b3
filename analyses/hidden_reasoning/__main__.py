"""Hidden reasoning: train the models, ask what they can, where the hidden value is, and draw what was found."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from minimal_mamba import Mamba
from minimal_mamba.files import make_folder, write_text

from .errors import TaskError, TrainingError
from .experiments.accuracy import Score, packed, score
from .experiments.results import RESULTS, Results, fingerprint
from .organism import load_folder, load_settings, organism_folder, write_organism
from .task import MASKED, Task
from .task.shortcuts import bounds
from .terminal import plain_errors, set_up, shown
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
    operations: Annotated[
        str | None, typer.Option(help="The words of it, such as one,two,double. [default: all]")
    ] = None,
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
    d_conv: Annotated[int | None, typer.Option(help="Tokens that the conv sees; 1: this one alone.")] = None,
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
        "operations": None if operations is None else tuple(operations.split(",")),
        "tokenizer": tokenizer, "loss": loss, "answer_weight": answer_weight, "seed": seed, "max_length": max_length,
        "batch_size": batch_size, "learning_rate": learning_rate, "d_model": d_model, "n_layer": n_layer,
        "d_conv": d_conv, "report_to": report_to,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    with plain_errors(), _folder(out, quick and not resume, task or "masked") as run:
        set_up(device, threads)
        base = read_settings(run) if resume else Settings()
        settings = replace(base, **{**(QUICK if quick and not resume else {}), **given})
        if steps is not None and steps != settings.steps:
            settings = settings.with_steps(steps)
        model = _trainer()(settings, run, resume=resume, device=device)
        words = settings.load_tokenizer()
        n = min(prompts, 100) if quick else prompts
        typer.echo(f"exact final answers on at most {n} prompts a length; chance is {1 / settings.modulus:.0%}")
        ask = partial(score, model, n=n, seed=EVALUATION_SEED, task=settings.task, tokenizer=words, written=True)
        found = shown(settings.task, range(1, settings.max_length + 1), ask)
        folder = write_organism(run, model, words, settings, packed(found, EVALUATION_SEED))
        typer.echo(f"written: {folder}" if out or not quick else "a quick run is not kept; name a folder with --out")


Model = Annotated[Path | None, typer.Option(help="Folder of an organism, or the name of one that ships. [masked]")]
Out = Annotated[Path | None, typer.Option(help="The results file. [default: runs/<kind>-<model>.json; --quick: none]")]
Quick = Annotated[bool, typer.Option("--quick", help="Small numbers, within 15 seconds.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")]
Seed = Annotated[int, typer.Option(min=0, help="Of the prompts.")]


@app.command()
def evaluate(
    model: Model = None,
    max_length: Annotated[int, typer.Option(help="Lengths 1 to this one.")] = 16,
    prompts: Annotated[int, typer.Option(min=1, help="Fresh prompts a length.")] = 2000,
    seed: Seed = 1,
    quick: Quick = False,
    out: Out = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Threads = None,
) -> None:
    """Print how often the final answer is right on prompts that were held out, by length."""
    with plain_errors(), _results("evaluate", model, out, quick) as (path, folder, name):
        set_up(device, threads)
        if max_length < 1:
            raise TaskError(f"--max-length {max_length}: a prompt has at least one step; give 1 or more.")
        max_length, prompts = (min(max_length, 4), min(prompts, 100)) if quick else (max_length, prompts)
        organism, words = load_folder(folder)
        settings = load_settings(folder)
        if settings.architecture == "transformer":
            max_length = min(max_length, settings.positions)
        numbers = {"prompts": prompts, "seed": seed}
        key = {"model": fingerprint(organism), "name": name, "task": settings.task_name, "modulus": settings.modulus,
               **numbers}  # fmt: skip
        kept = Results(path, "evaluate", key, command=_command("evaluate", name, max_length=max_length, **numbers))
        ask = partial(score, organism.to(device), task=settings.task, tokenizer=words, written=True)
        typer.echo(f"exact final answers on at most {prompts} prompts a length; chance is {1 / settings.modulus:.0%}")
        for what in ("concealed", "shown") if settings.task_name == "masked" else ("concealed",):
            typer.echo({"concealed": "the values are not written", "shown": "the text shows every value"}[what])

            def kept_score(length: int, what: str = what) -> Score:
                found = partial(ask, length, prompts, seed, concealed=what == "concealed")
                return Score(**kept.part(f"{what}, length {length}", lambda: asdict(found())))

            shown(settings.task, range(1, max_length + 1), kept_score, beside=what == "concealed")


@app.command()
def shortcuts(
    task: Annotated[str, typer.Option(help="direct, masked or doublethink.")] = "masked",
    acts: Annotated[str, typer.Option(help="What the words do: arithmetic, or s5, the control.")] = "arithmetic",
    modulus: Annotated[int, typer.Option(help="Of the arithmetic.")] = 5,
    max_length: Annotated[int, typer.Option(min=1, help="Lengths 1 to this one.")] = 16,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Compute exactly what the best function of less than the whole prompt can reach, by length."""
    rules = acts if modulus == Task.modulus else f"{acts}-{modulus}"
    with plain_errors(), _results("shortcuts", Path(f"{task}-{rules}"), out, quick) as (path, _, _name):
        chosen = Task(modulus, acts=acts, name=task)
        max_length = min(max_length, 6) if quick else max_length
        key = {"task": task, "acts": acts, "modulus": modulus, "max_length": max_length}
        kept = Results(path, "shortcuts", key, command=f"python -m analyses.hidden_reasoning shortcuts --task {task} "
                       f"--acts {acts} --max-length {max_length}")  # fmt: skip
        for what, share in kept.part("bounds", lambda: bounds(chosen, range(1, max_length + 1))).items():
            typer.echo(f"{what:24}" + " ".join(f"{100 * v:4.0f}%" for v in share.values()))


@app.command()
def patch(
    model: Model = None,
    num_steps: Annotated[int, typer.Option(min=2, help="Operations of a prompt.")] = 8,
    differ: Annotated[int, typer.Option(min=1, help="The operation in which a pair differs, from 1.")] = 2,
    n: Annotated[int, typer.Option("--pairs", min=2, help="Pairs of prompts.")] = 200,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of the hand-overs.")] = 1000,
    seed: Seed = 0,
    quick: Quick = False,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Find where the hidden value is: patching, controls, sets of layers, ablation, hand-overs."""
    with plain_errors(), _results("patch", model, out, quick) as (path, folder, name):
        from .experiments.patching import patch as everything

        set_up("cpu", threads)
        if quick:
            num_steps, differ, n, prompts = 3, 1, 6, 20
        if differ > num_steps:
            raise TaskError(f"--differ {differ}: a prompt of {num_steps} operations has operations 1..{num_steps}.")
        organism, settings = _mamba(folder, "direct", "masked", "doublethink")
        if settings.task_name == "doublethink" and differ > num_steps - 2:
            raise TaskError(
                f"--differ {differ}: of doublethink the next overt values are read, one and two words on, so of "
                f"{num_steps} operations one of 1..{num_steps - 2} may differ."
            )
        numbers = {"num_steps": num_steps, "differ": differ, "pairs": n, "prompts": prompts, "seed": seed}
        key = {"model": fingerprint(organism), "name": name, "task": settings.task_name, "quick": quick, **numbers}
        kept = Results(path, "patch", key, command=_command("patch", name, **numbers))
        given: dict[str, Any] = {"num_steps": num_steps, "differ": differ - 1, "n": n, "seed": seed, "hand_n": prompts}
        everything(kept, organism, settings.task, quick=quick, **given)
        _written(path, out, quick)


@app.command()
def probe(
    model: Model = None,
    num_steps: Annotated[int, typer.Option(min=2, help="Operations of a prompt.")] = 8,
    prompts: Annotated[int, typer.Option(min=20, help="Prompts that the probes are fitted on.")] = 600,
    seed: Seed = 0,
    quick: Quick = False,
    out: Out = None,
    threads: Threads = None,
) -> None:
    """Find what linear probes read, with controls, and what goes when it is erased."""
    with plain_errors(), _results("probe", model, out, quick) as (path, folder, name):
        from .experiments.probing import probing

        set_up("cpu", threads)
        num_steps, prompts = (2, 60) if quick else (num_steps, prompts)
        organism, settings = _mamba(folder, "masked", "doublethink")
        numbers = {"num_steps": num_steps, "prompts": prompts, "seed": seed}
        key = {"model": fingerprint(organism), "name": name, "task": settings.task_name, "quick": quick, **numbers}
        kept = Results(path, "probe", key, command=_command("probe", name, **numbers))
        probing(kept, organism, settings.task, num_steps=num_steps, n=prompts, seed=seed, layers=[0] if quick else None)
        _written(path, out, quick)


@app.command()
def align(
    model: Model = None,
    site: Annotated[str, typer.Option(help="conv_state, ssm_state or recurrent_state, of all layers.")] = "conv_state",
    num_steps: Annotated[int, typer.Option(min=2, help="Operations of a prompt.")] = 6,
    step: Annotated[int, typer.Option(min=1, help="The memory after this operation, from 1; not the last.")] = 3,
    n: Annotated[int, typer.Option("--pairs", min=10, help="Pairs of prompts, of which 30 % are held out.")] = 600,
    seeds: Annotated[int, typer.Option(min=1, help="Searches, with pairs of their own.")] = 2,
    quick: Quick = False,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Find in how many dimensions of a memory the value is: swapped, they hand it over."""
    with plain_errors(), _results("align", model, out, quick) as (path, folder, name):
        from .experiments.aligning import DIMENSIONS, aligning

        set_up("cpu", threads)
        num_steps, step, n, seeds = (2, 1, 20, 1) if quick else (num_steps, step, n, seeds)
        if step >= num_steps:
            raise TaskError(f"--step {step}: of a prompt of {num_steps} operations give 1..{num_steps - 1}.")
        if site not in ("conv_state", "ssm_state", "recurrent_state"):
            raise TaskError(f"--site {site} is no memory: conv_state, ssm_state or recurrent_state.")
        organism, settings = _mamba(folder, "masked")
        numbers = {"num_steps": num_steps, "step": step, "pairs": n, "seeds": seeds}
        key = {"model": fingerprint(organism), "name": name, "task": settings.task_name, "site": site, "quick": quick,
               **numbers}  # fmt: skip
        kept = Results(path, "align", key, command=f"{_command('align', name, **numbers)} --site {site}")
        dimensions, epochs = ((1, 2), 2) if quick else (DIMENSIONS, 30)
        aligning(kept, organism, settings.task, site=site, num_steps=num_steps, step=step, n=n, seeds=seeds,
                 dimensions=dimensions, epochs=epochs)  # fmt: skip
        _written(path, out, quick)


@app.command()
def curves(
    folder: Annotated[Path, typer.Option(help="Where the trainings are; one that was stopped goes on.")] = Path("runs"),
    quick: Quick = False,
    out: Out = None,
    threads: Threads = 1,
) -> None:
    """Train many small models: losses, depths, the control. Hours; what is in the results is not trained again."""
    with plain_errors(), _results("curves", Path("all"), out, quick) as (path, _, _name):
        from .experiments.curves import train_all

        set_up("cpu", threads)
        kept = Results(path, "curves", {"quick": quick}, command="python -m analyses.hidden_reasoning curves")
        if quick:
            with tempfile.TemporaryDirectory() as scratch:
                train_all(kept, Path(scratch), quick=True)
        else:
            train_all(kept, folder / "curves")
        _written(path, out, quick)


@app.command()
def figures(
    results: Annotated[Path, typer.Option(help="Folder of the results files.")] = RESULTS,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures. [default: runs/figures]")] = None,
    into: Annotated[Path | None, typer.Option(help="A page in which to put the numbers of the results.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Draw only PNGs, into a folder that goes again.")] = False,
) -> None:
    """Draw every figure of the study from its results files, and say what they say in numbers."""
    with plain_errors():
        from .drawing import draw_all
        from .findings import page

        with tempfile.TemporaryDirectory() as scratch:
            kinds = ("png",) if quick else ("png", "pdf")
            for made in draw_all(results, Path(scratch) if quick else out or Path("runs/figures"), kinds):
                typer.echo(made.name if quick else f"{made}.png")
        if into is not None:
            write_text(into, page(into.read_text(), results))
            typer.echo(str(into))


@app.command()
def demo(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures and results.json.")] = Path("runs/demo"),
    n: Annotated[int, typer.Option("--pairs", min=2, help="Pairs of prompts.")] = 100,
    num_steps: Annotated[int, typer.Option(min=2, help="Operations of a prompt.")] = 6,
    differ: Annotated[
        int, typer.Option(min=1, help="The operation in which a pair differs, from 1; not the last.")
    ] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the pairs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="20 pairs of 3 operations.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; for a model this small more gain little.")] = 1,
) -> None:
    """Patch both memories over all layers and positions, draw it, and say in three sentences what it shows."""
    with plain_errors():
        from .experiments.demo import sweep, write

        set_up("cpu", threads)
        n, num_steps = (min(n, 20), min(num_steps, 3)) if quick else (n, num_steps)
        if differ >= num_steps:
            raise TaskError(
                f"--differ {differ}: of a prompt of {num_steps} operations one of 1..{num_steps - 1} may differ, so "
                "that words follow in which the value is carried."
            )
        organism, settings = _mamba(_model_folder(model), "masked")
        if settings.task != MASKED:
            raise TaskError(
                f"{model} was trained on other rules; the demo asks arithmetic modulo 5, from 0, all words."
            )
        make_folder(out)
        found = sweep(organism, num_steps=num_steps, which_step=differ - 1, n=n, seed=seed)
        options = f"--pairs {n} --num-steps {num_steps} --differ {differ} --seed {seed}"
        said = write(out, organism, found, f"python -m analyses.hidden_reasoning demo {options}", seed)
        typer.echo("\n" + "\n\n".join(said) + f"\n\nFigures and results.json: {out}")


def _mamba(folder: Path, *tasks: str) -> tuple[Mamba, Settings]:
    """A Mamba that knows one of some tasks in the study's own words."""
    model, tokenizer = load_folder(folder)
    settings = load_settings(folder)
    if not isinstance(model, Mamba):
        raise TaskError(f"{folder} is a transformer, which has no state to patch or probe; give a Mamba.")
    if settings.task_name not in tasks:
        raise TaskError(f"{folder} was trained on {settings.task_name}; this command asks {' or '.join(tasks)}.")
    if tokenizer != settings.task.tokenizer:
        raise TaskError(
            f"{folder} has a tokenizer of its own; the prompts of this command are in the study's words: give a model "
            "that was trained without --tokenizer and --pretrained."
        )
    return model, settings


def _trainer() -> Callable[..., nn.Module]:
    try:
        from .training.train import train as train_model  # transformers takes seconds to import
    except ModuleNotFoundError as error:
        raise TrainingError(f"training needs {error.name}: pip install 'mambascope[train]'.") from None
    return train_model


def _command(kind: str, name: str, **numbers: int) -> str:
    options = {"num_steps": "num-steps", "max_length": "max-length"}
    given = " ".join(f"--{options.get(k, k)} {v}" for k, v in numbers.items())
    return f"python -m analyses.hidden_reasoning {kind} --model {name} {given}"


def _written(path: Path, out: Path | None, quick: bool) -> None:
    typer.echo("a quick result is not kept; name a file with --out" if quick and out is None else f"written: {path}")


@contextmanager
def _results(kind: str, model: Path | None, out: Path | None, quick: bool) -> Iterator[tuple[Path, Path, str]]:
    """The results file of a command, the model's folder, and the name that the file has of it."""
    folder = model or Path("masked") if kind in ("shortcuts", "curves") else _model_folder(model)
    name = folder.parent.name if folder.name == "organism" else folder.name
    if out is None and quick:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch) / f"{kind}.json", folder, name
    else:
        yield out or Path("runs") / f"{kind}-{name}.json", folder, name


def _model_folder(model: Path | None) -> Path:
    """A folder as it is given, or that of a model that ships, by its name."""
    given = model or Path("masked")
    return given if given.is_dir() else organism_folder(str(given))


@contextmanager
def _folder(out: Path | None, temporary: bool, name: str) -> Iterator[Path]:
    if out is None and temporary:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "run"
    else:
        yield out or Path("runs") / name


if __name__ == "__main__":
    app()
