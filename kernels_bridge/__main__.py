"""`python -m kernels_bridge backends|check|bisect`: what is here, and the proof that it computes the same."""

import torch
import typer

from .backends import table
from .harness.cli import bisect, check

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(check)
app.command()(bisect)


@app.command()
def backends() -> None:
    """What each backend needs, and whether it is here."""
    typer.echo(table("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    app()
