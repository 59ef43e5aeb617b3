"""`python -m kernels_bridge backends|check|bisect|record`: what is here, and the proof that it computes the same."""

from typing import Annotated

import typer

from .backends import table
from .harness.cli import bisect, check, device_of, judged, record

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.command()(check)
app.command()(bisect)
app.command()(record)


@app.command()
def backends(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA if it is here")] = "",
) -> None:
    """What each backend needs, what of it is here, and how to install the rest."""
    with judged():
        typer.echo(table(device_of(device)))


if __name__ == "__main__":
    app()
