"""Every figure of the study, from its results files alone: `draw_all`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..experiments.results import ResultsError, read, together
from . import dimensions, maps, probes, trainings
from .style import figure_file
from .summary import summary

MODELS = ("evaluate-masked", "evaluate-transformer")
BOUNDS = "shortcuts-masked-arithmetic"
# name -> the results that it needs, and what draws it
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {
    "accuracy": ((*MODELS, "evaluate-state_only", "evaluate-doublethink", BOUNDS), trainings.accuracy),
    "losses": (("curves-all",), trainings.losses),
    "depth": (("curves-all",), trainings.depth),
    "patching": (("patch-masked",), maps.patching),
    "control": (("patch-masked",), maps.control),
    "sets": (("patch-masked",), maps.sets),
    "needed": (("patch-masked",), maps.needed),
    "handover": (("patch-masked",), maps.handover),
    "state_only": (("patch-state_only",), maps.state_only),
    "probes": (("probe-masked",), probes.probes),
    "erased": (("probe-masked", "probe-doublethink"), probes.erased),
    "doublethink": (("patch-doublethink",), probes.doublethink),
    "channels": (("patch-doublethink",), probes.channels),
    "dimensions": (("align-masked", "align-state_only"), dimensions.dimensions),
    "summary": ((*MODELS, BOUNDS, "curves-all", "patch-masked"), summary),
}


def draw_all(results: Path, out: Path, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Draw each figure whose results are there, in each kind of file; without the ending.

    Raises:
        ResultsError: no results at all, of another version, or of models or rules that are not the same; nothing is
            drawn then.
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = {need: results / f"{need}.json" for needs, _ in FIGURES.values() for need in needs}
    whole = {need: read(path, need.split("-")[0]) for need, path in paths.items() if path.is_file()}
    together(whole)
    found = {need: made["parts"] for need, made in whole.items()}
    made = []
    for name, (needs, draw) in FIGURES.items():
        if not all(need in found for need in needs):
            continue
        out.mkdir(parents=True, exist_ok=True)
        try:
            with figure_file(out / name, kinds) as new:
                draw(new, **{need.replace("-", "_"): found[need] for need in needs})
        except KeyError as error:
            raise ResultsError(
                f"{name}: {' or '.join(str(paths[need]) for need in needs)} has no part {error} yet; the command that "
                "its provenance names goes on with it."
            ) from None
        made.append(out / name)
    if not made:
        raise ResultsError(
            f"{results} has no results to draw; `python -m analyses.hidden_reasoning evaluate`, patch, probe, "
            "shortcuts and curves make them."
        )
    return made
