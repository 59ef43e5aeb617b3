"""`python -m analyses.benchmarks all`: what mambascope costs, beside what people use now."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from minimal_mamba.files import write_json, write_text
from minimal_mamba.provenance import provenance

from .report import RESULTS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Again = Annotated[bool, typer.Option(help="measure anew what this commit has measured already")]
Rounds = Annotated[float, typer.Option(min=0.0, help="times the usual duration of each piece; at least 3 rounds")]
Out = Annotated[Path, typer.Option(help="the folder of the results")]


@app.callback()
def main() -> None:
    """Benchmarks, side by side in one process; each piece is written when it is done, and a second run goes on."""


def _write(path: Path, found: dict[str, Any], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found | more | {"provenance": provenance(threads=torch.get_num_threads(), dtype="float32")})


@app.command("pieces-of", hidden=True)
def pieces_of(environment: str, out: Path, scale: float, slugs: list[str]) -> None:
    """Some pieces of work, in this process."""
    from . import cpu as bench
    from .environments import tried

    torch.set_num_threads(torch.get_num_threads())
    for piece in (p for p in bench.PIECES.values() if p.slug in slugs):
        found = bench.measure(piece, tried(environment), seconds=scale * piece.seconds)
        _write(out / "cpu" / f"{piece.slug}.{environment}.json", found, environment=environment)


@app.command("memory-of", hidden=True)
def memory_of(environment: str, out: Path, slugs: list[str]) -> None:
    """Peak memory of some pieces of work."""
    from . import memory as bench
    from .environments import tried

    for piece in (p for p in bench.PIECES if p.slug in slugs):
        found = bench.measure(piece, tried(environment))
        _write(out / "cpu" / f"memory-{piece.slug}.{environment}.json", found, environment=environment)


@app.command("growth-of", hidden=True)
def growth_of(backend: str, out: Path) -> None:
    """How one backend's cost grows."""
    from . import growth as bench

    _write(out / f"growth-{backend}.json", bench.measure(backend))


@app.command()
def cpu(out: Out = RESULTS, again: Again = False, scale: Rounds = 1.0, threads: bool = True, only: str = "") -> None:
    """Time of all work beside the peers', on one thread and on all; `--only` names pieces by a part of their name."""
    from .cpu import PIECES
    from .environments import done, pythons, spawn

    for n in (1, 0) if threads else (1,):
        for environment, python in pythons().items():
            if environment == "lens" and not n:
                continue
            slugs = [p.slug for p in PIECES.values() if p.threads == n and only in p.name]
            todo = [s for s in slugs if again or not done(out / "cpu" / f"{s}.{environment}.json")]
            share = scale * (0.4 if environment == "lens" else 1.0)
            if todo:
                spawn(python, ["pieces-of", environment, str(out), str(share), *todo], n)


@app.command()
def memory(out: Out = RESULTS, again: Again = False) -> None:
    """Peak memory beside the peers', each call in a process of its own."""
    from .environments import done, pythons, spawn
    from .memory import PIECES

    for environment, python in pythons().items():
        slugs = [p.slug for p in PIECES]
        todo = [s for s in slugs if again or not done(out / "cpu" / f"memory-{s}.{environment}.json")]
        if todo:
            spawn(python, ["memory-of", environment, str(out), *todo])


@app.command()
def growth(out: Out = RESULTS, again: Again = False) -> None:
    """How time and memory of ours grow with length, batch, layers and edits, and the figure."""
    import sys

    from .environments import done, spawn
    from .peers import ours_here

    for backend in ours_here():
        if again or not done(out / f"growth-{backend}.json"):
            spawn(sys.executable, ["growth-of", backend, str(out)])
    figure(out)


@app.command()
def figure(out: Out = RESULTS) -> None:
    """Draw growth.png from the results."""
    from .growth import figure as draw

    results = [json.loads(p.read_text()) for p in sorted(out.glob("growth-*.json"), reverse=True)]
    for r in results:
        print(f"{r['backend']}: the scan's time grows as length^{r['checks']['slope']:.2f}, "
              f"and holds at most {r['checks']['beyond_mb']:.1f} MB beyond its output")  # fmt: skip
    for path in draw(results, out / "growth"):
        print(path)


@app.command()
def attribution(out: Out = RESULTS, again: Again = False) -> None:
    """The grid of attributions of every state, over one forward and backward."""
    from . import attribution as bench
    from .environments import done

    if again or not done(out / "attribution.json"):
        _write(out / "attribution.json", bench.measure())
    found = json.loads((out / "attribution.json").read_text())
    for site, ratio in found["ratio"].items():
        print(f"{site:22} {ratio:5.2f} times one forward and backward (at most {found['target']:.0f})")


@app.command()
def show(out: Out = RESULTS) -> None:
    """Every result, then the targets beside what was reached and the floor."""
    from . import report

    results = report.load(out)
    print(report.table(results), "\n")
    print(report.targets(results))


@app.command()
def readme(
    out: Out = RESULTS, into: Annotated[Path | None, typer.Option(help="put them between its marks")] = None
) -> None:
    """The README's tables."""
    from ..pages import placed
    from . import report

    made = report.markdown(report.load(out))
    if into is None:
        print(made)
    else:
        write_text(into, placed(into.read_text(), "benchmarks", made))


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda; cpu rehearses at toy sizes")] = "cuda",
    rounds: Annotated[int, typer.Option(min=1, help="timed calls of each")] = 20,
    out: Out = RESULTS,
) -> None:
    """The fused backend beside mamba-ssm's own model, under edits, in a sweep; or what is missing for it."""
    from . import gpu as bench

    if lacks := bench.missing(device):
        print(f"cannot measure on {device}: {lacks}")
        raise typer.Exit(1)
    found = bench.measure(device, rounds)
    print(bench.table(found))
    if not found["rehearsal"]:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "gpu.json", found)
        print(f"\nwritten to {out / 'gpu.json'}")


@app.command("all")
def everything(out: Out = RESULTS, again: Again = False, scale: Rounds = 1.0) -> None:
    """All of it on the CPU: at most 20 minutes on a quiet machine; what this commit has measured already is kept."""
    begin = time.perf_counter()
    cpu(out, again, scale)
    memory(out, again)
    growth(out, again)
    attribution(out, again)
    show(out)
    tqdm.write(f"\n{(time.perf_counter() - begin) / 60:.1f} minutes; results in {out}")


@app.command()
def trainer(
    rounds: Annotated[int, typer.Option(min=1, help="runs of each")] = 3,
    out: Annotated[Path, typer.Option(help="where the results go")] = RESULTS / "trainer.json",
) -> None:
    """What Trainer costs beside a bare loop, a step of the shipped model's training."""
    from . import trainer as bench

    found = bench.run(rounds)
    for name, seconds in found["median"].items():
        print(f"{name:10} {seconds * 1e3:7.1f} ms a step")
    print(f"overhead   {found['overhead']:7.1%}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)


if __name__ == "__main__":
    app()
