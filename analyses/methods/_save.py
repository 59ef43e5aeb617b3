"""How the gallery's figures are saved."""

from pathlib import Path
from typing import Any


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a matplotlib figure as png and pdf, close it, and return the paths."""
    import matplotlib.pyplot as plt

    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=200)
    plt.close(figure)
    return paths
