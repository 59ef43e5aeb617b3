"""`python -m analyses.methods [NAME ...]`: run the methods of the toolkit and draw the figure of each."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from minimal_mamba.errors import InputError, MambascopeError, nearest

FOLDER = Path(__file__).parent
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


def methods() -> list[str]:
    """The names of the gallery's methods: its modules."""
    return sorted(m.name for m in pkgutil.iter_modules([str(FOLDER)]) if not m.name.startswith("_"))


def figure_of(name: str) -> Callable[[Path], list[Path]]:
    """The `figure` of a method.

    Raises:
        InputError: there is no such method.
    """
    if name not in methods():
        raise InputError(f"no method {name!r}.{nearest(name, methods())} There are: {', '.join(methods()) or 'none'}.")
    figure: Callable[[Path], list[Path]] = importlib.import_module(f"{__package__}.{name}").figure
    return figure


@app.command()
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which methods. [default: all]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("runs/methods"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; for models this small more gain little.")] = 1,
) -> None:
    """Run methods on the model that ships, or on planted ones, and draw what they find; some seconds each."""
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(threads)
    try:
        chosen = {name: figure_of(name) for name in names or methods()}
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(chosen.items(), unit="figure") as bar:
            for name, figure in bar:
                bar.set_postfix_str(name)
                for path in figure(out):
                    bar.write(str(path))
    except (MambascopeError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
