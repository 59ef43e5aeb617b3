"""`python -m analyses.planted`: score every method on every planted model, and write the table."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from minimal_mamba.errors import CheckpointError
from minimal_mamba.files import make_folder, write_json

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of each model.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for results.json and table.md.")] = Path("runs/planted"),
) -> None:
    """Each method sees models, prompts and metric, and never the truth. About four minutes on one core."""
    from .table import markdown, results

    torch.set_num_threads(1)  # for models this small more lose
    try:
        make_folder(out)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    found = results(seeds)
    write_json(out / "results.json", found)
    (out / "table.md").write_text(markdown(found))
    typer.echo(markdown(found))
    typer.echo(f"written: {out / 'results.json'}, {out / 'table.md'}")


if __name__ == "__main__":
    app()
