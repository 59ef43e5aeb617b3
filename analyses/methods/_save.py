"""How the gallery's figures are saved."""

from pathlib import Path
from typing import Any


def save(figure: Any, folder: Path, name: str, *, palette: bool = False) -> list[Path]:
    """Write a matplotlib figure as png and pdf, close it, and return the paths.

    Args:
        palette: 256 colours in the png: of a cloud of points, a third of the bytes, each colour within 4 %.
    """
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=200)
    if palette:
        with Image.open(paths[0]) as image:
            small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(paths[0], optimize=True)
    plt.close(figure)
    return paths
