"""`python -m analyses.benchmarks cpu`: time mambascope beside HF transformers and mambapy."""

from pathlib import Path
from typing import Annotated

import typer

from minimal_mamba.files import write_json

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
RESULTS = Path(__file__).parent / "results"


@app.callback()
def main() -> None:
    """Benchmarks, side by side in one process."""


@app.command()
def cpu(
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds, after one that warms up")] = 9,
    everything: Annotated[bool, typer.Option("--all", help="also the size M")] = False,
    quick: Annotated[bool, typer.Option(help="one round of the smallest work, nothing written")] = False,
    out: Annotated[Path, typer.Option(help="where the results go")] = RESULTS / "cpu.json",
) -> None:
    """Forward and training step, one thread, against HF's slow path and mambapy."""
    from . import cpu as bench

    if quick:
        print(bench.table([bench.measure("forward S, batch 8, length 64", 1)]))
        return
    found = bench.run(rounds, everything)
    print(bench.table(found["results"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    print(f"\nwritten to {out}")


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
