"""How time and memory of ours grow with the length, the batch, the layers and the number of edits; size S, one thread.

The scan alone is held to what is promised: time linear in length, memory beyond its output constant. Each point is a
process of its own.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from interp import Set, at, run
from kernels_bridge import resolve
from kernels_bridge.lively import lively
from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.tap import Tap

from .cpu import SIZES
from .memory import alone, cost

LENGTHS = (1024, 4096, 16384, 65536)
AXES: dict[str, tuple[int, ...]] = {
    "scan, length": LENGTHS,
    "length": LENGTHS,
    "batch": (1, 4, 16, 64),
    "layers": (1, 4, 16, 64),
    "edited positions a layer": (0, 1, 4, 16, 64, 256),
}
SLOPE = 1.25  # of the scan's time in length, on log scales
BEYOND = 8.0  # MB that the scan may hold beyond its inputs and output, at any length


def point(axis: str, x: int, backend: str, size: str = "S", calls: int = 5) -> dict[str, float]:
    """Seconds and peak MB of one call, and the MB of what it gives."""
    d_model, n_layer, vocab = SIZES[size]
    b = x if axis == "batch" else 8 if axis == "layers" else 1
    l = x if "length" in axis else 1024 if "edit" in axis else 256
    config = MambaConfig(d_model, x if axis == "layers" else n_layer, vocab_size=vocab)
    ids, rng = torch.randint(0, vocab, (b, l), generator=torch.Generator().manual_seed(0)), torch.Generator()
    output = b * l * config.padded_vocab * 4 / 2**20
    if axis.startswith("scan"):
        return _scan(l, config, backend, calls, rng)
    model = lively(Mamba(config))
    if "edit" in axis:
        places = torch.linspace(1, l - 2, x).long().tolist() if x else []
        value = torch.randn(1, b, 1, config.d_inner, config.d_state, generator=rng)
        edits = [Set(at.ssm_state(pos=places), value.expand(n_layer, b, x, -1, -1).clone())] if x else []
        few = [Set(at.ssm_state(layer=0, pos=2), value[0, :, 0])] if x else []
    else:
        edits = few = []

    def do() -> object:
        return run(model, ids, edits, backend=backend)

    with torch.no_grad():
        return cost(do, lambda: run(model, ids[:1, :8], [] if b > 1 else few, backend=backend), calls) | {
            "output": output
        }


def _scan(l: int, config: MambaConfig, backend: str, calls: int, rng: torch.Generator) -> dict[str, float]:
    e, n = config.d_inner, config.d_state
    u, B, C = (torch.randn(1, l, k, generator=rng) for k in (e, n, n))
    dt, A = torch.rand(1, l, e, generator=rng), -torch.rand(e, n, generator=rng) - 0.1
    h, ops, tap = torch.zeros(1, e, n), resolve(backend), Tap()

    def scan(m: int) -> Callable[[], object]:
        return lambda: ops.scan(u[:, :m], dt[:, :m], A, B[:, :m], C[:, :m], h, tap=tap)

    with torch.no_grad():
        return cost(scan(l), scan(8), calls) | {"output": l * e * 4 / 2**20}


def measure(backend: str, axes: dict[str, tuple[int, ...]] = AXES, size: str = "S", calls: int = 5) -> dict[str, Any]:
    """Every point of every axis, and whether the scan is linear in length and constant in memory beyond its output."""
    found: dict[str, list[dict[str, float]]] = {}
    places = [(axis, x) for axis, several in axes.items() for x in several]
    for axis, x in tqdm(places, desc=f"growth, {backend}"):
        made = alone(lambda axis=axis, x=x: point(axis, x, backend, size, calls))  # type: ignore[misc]
        found.setdefault(axis, []).append({"x": x, **made})
    return {
        "backend": backend,
        "size": size,
        "axes": found,
        "checks": checks(found),
        "threads": torch.get_num_threads(),
    }


def checks(axes: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The slope of the scan's time in length on log scales, and its largest memory beyond its output."""
    scan = axes["scan, length"]
    first, last = scan[0], scan[-1]
    slope = math.log(last["seconds"] / first["seconds"]) / math.log(last["x"] / first["x"])
    beyond = max(p["mb"] - p["output"] for p in scan)
    return {"slope": slope, "linear": slope < SLOPE, "beyond_mb": beyond, "constant": beyond < BEYOND}


def figure(results: list[dict[str, Any]], path: Path) -> list[Path]:
    """Time and memory against length, batch, layers and edits, of each backend, on log scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    fig, grid = plt.subplots(2, 2, figsize=(3.4, 3.6), layout="constrained")
    colours = dict(zip(("torch", "compiled"), ("#0072B2", "#D55E00"), strict=True))
    for r in results:
        name, colour, axes = r["backend"], colours.get(r["backend"], "#555555"), r["axes"]

        def line(ax: Any, axis: str, what: str, style: str, label: str, axes: Any = axes, colour: str = colour) -> None:
            points = [p for p in axes[axis] if p["x"]]
            ys = [
                p["seconds"] if what == "seconds" else max(p["mb"] - what.count("-") * p["output"], 0.1) for p in points
            ]
            ax.plot([p["x"] for p in points], ys, style, color=colour, lw=1, ms=2.5, label=label)

        line(grid[0, 0], "length", "seconds", "o-", f"{name}, forward")
        line(grid[0, 0], "scan, length", "seconds", "s:", f"{name}, one scan")
        line(grid[0, 1], "length", "mb", "o-", f"{name}, forward")
        line(grid[0, 1], "scan, length", "mb-", "s:", f"{name}, scan beyond y")
        line(grid[1, 0], "batch", "seconds", "o-", f"{name}, rows")
        line(grid[1, 0], "layers", "seconds", "^--", f"{name}, layers")
        edited = axes["edited positions a layer"]
        line(grid[1, 1], "edited positions a layer", "seconds", "o-", name)
        grid[1, 1].axhline(edited[0]["seconds"], color=colour, lw=0.7, ls=":", label=f"{name}, none set")
    points = results[0]["axes"]["length"]
    grid[0, 1].plot(
        [p["x"] for p in points], [p["output"] for p in points], color="#999999", lw=0.8, label="the logits"
    )
    labels = (("length (tokens)", "CPU time (s)"), ("length (tokens)", "peak memory (MB)"),
              ("rows, or layers", "CPU time (s)"), ("states set in each layer", "CPU time (s)"))  # fmt: skip
    for ax, (x, y) in zip(grid.flat, labels, strict=True):
        ax.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        ax.xaxis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        low = min(low, 0.1)
        ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend above the lines
        ax.yaxis.set_minor_locator(NullLocator())
        ax.legend(fontsize=5, loc="upper left", handlelength=1.8, borderaxespad=0, labelspacing=0.2)
    made = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    for file in made:
        fig.savefig(file, dpi=300, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    plt.close(fig)
    return made
