"""The study's style: one palette, column widths, and figures that are saved as PNG and PDF."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minimal_mamba.files import write_files

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"  # Okabe and Ito
STYLE: Any = {"font.size": 7, "axes.titlesize": 7, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "legend.fontsize": 6, "pdf.fonttype": 42, "lines.linewidth": 1.1}  # fmt: skip
COLUMN, PAGE = 3.4, 7.0  # inches
CHANCE = 0.2
NAMES = {
    "ssm_state": "SSM state",
    "conv_state": "conv state",
    "recurrent_state": "SSM and conv state",
    "resid_post": "residual stream",
}


def legend_below(ax: Any, ncols: int) -> None:
    """The legend of one of a figure's axes, below them all."""
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside lower center", ncols=ncols)


@contextmanager
def figure_file(path: Path, kinds: Sequence[str] = ("png", "pdf")) -> Iterator[Callable[..., Any]]:
    """Gives `subplots` in the study's style, and saves what was made with it."""
    import matplotlib.pyplot as plt

    made: list[Any] = []

    def subplots(*args: Any, **more: Any) -> Any:
        fig, axes = plt.subplots(*args, constrained_layout=True, **more)
        made.append(fig)
        return axes

    with plt.rc_context(STYLE):
        yield subplots
        facts: dict[str, Any] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}

        def writer(kind: str) -> Callable[[Path], object]:
            return lambda file: made[0].savefig(file, format=kind, dpi=300, metadata=facts[kind])

        write_files(path.parent, {f"{path.name}.{kind}": writer(kind) for kind in kinds})
        plt.close(made[0])
