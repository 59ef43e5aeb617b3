"""Sweeps on disk: each group as soon as it is done, and at the end the grid with all that it takes to make it again.

sweep.json              what the sweep is: model, tokens, edits, metrics, backend, groups; or probe_grid.json
group-00007.safetensors what one group gave
grid.json, .safetensors of `patch_grid`: the recipe, the inputs and the numbers
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimal_mamba import Edit, Mamba
from minimal_mamba.errors import CheckpointError, EditError
from minimal_mamba.files import make_folder, write_files, write_json
from minimal_mamba.provenance import digest, model_digest, provenance, version

from ..run import Metric
from .functions import known_by
from .grid import Grid

VERSION = 1


def function(fn: object) -> str:
    """`module:qualname` of a function, as far as it has one."""
    return f"{getattr(fn, '__module__', None)}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def edits_digest(cell: Sequence[Edit]) -> str:
    """Of a cell's edits: kinds, places, rows, values, functions."""
    parts: list[object] = []
    for edit in cell:
        fields = {k: known_by(v) if callable(v) else v for k, v in edit.describe().items()}
        parts += [type(edit).__name__, str(edit.address), edit.rows, fields, edit.value]
    return digest(*parts)


class Saved:
    """The folder of one sweep, or of another `kind` of work that is done part by part.

    Args:
        folder: made if it is not there. What the work is, is written with its first part: one that was refused before
            leaves the folder as it was.
        what: what the work is, in JSON's types.
    Raises:
        CheckpointError: the folder holds another sweep, or one that another version of mambascope began, or cannot be
            read.
    """

    def __init__(self, folder: str | Path, what: Mapping[str, Any], kind: str = "sweep"):
        self.folder = Path(folder)
        what = {"version": VERSION, **what}
        head = self.head = self.folder / f"{kind}.json"
        self.what: dict[str, Any] | None = None  # to be written
        if not head.exists():
            if any(not file.name.startswith(".") for file in make_folder(self.folder).iterdir()):
                raise CheckpointError(f"{self.folder} holds other files and no {head.name}; give an empty folder.")
            self.what = what
            return
        there = read_json(head)
        # of mambascope's versions too, where an earlier one wrote which it was
        mine = version()
        what["mambascope"] = mine
        there["mambascope"] = there.pop("provenance", {}).get("packages", {}).get("mambascope", mine)
        differ = [k for k in sorted({*what, *there}) if json.loads(json.dumps(what.get(k))) != there.get(k)]
        if differ:
            says = ", ".join(f"{k} ({there.get(k)!s:.40} there, {what.get(k)!s:.40} here)" for k in differ)
            raise CheckpointError(
                f"{self.folder} holds another {kind}: they differ in {says}. Give another folder, or delete this one."
            )

    def load(self, group: int) -> dict[str, Tensor] | None:
        """What a group gave, or None if it was not done."""
        file = self._file(group)
        if not file.exists():
            return None
        try:
            values = load_file(file)
            with safe_open(file, "pt") as opened:
                stamp = (opened.metadata() or {}).get("digest")
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from None
        if stamp != digest(*(x for item in sorted(values.items()) for x in item)):
            raise self._damaged(file, "its numbers are not those that were written")
        return values

    def save(self, group: int, values: Mapping[str, Tensor]) -> None:
        """Write what a group gave, whole or not at all."""
        if self.what is not None:
            write_json(self.head, self.what | {"provenance": provenance()})
            self.what = None
        kept = {name: v.cpu().contiguous() for name, v in values.items()}
        stamp = {"digest": digest(*(x for item in sorted(kept.items()) for x in item))}
        file = self._file(group)
        write_files(self.folder, {file.name: lambda to: save_file(kept, to, stamp)})

    def _file(self, group: int) -> Path:
        return self.folder / f"group-{group:05d}.safetensors"

    @staticmethod
    def _damaged(file: Path, why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged ({why}). Delete this file: what it held is then made again.")


def read_json(file: Path) -> dict[str, Any]:
    """A file of JSON, or CheckpointError."""
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); a method with path= writes it. If it is damaged, delete the folder."
        ) from None
    return found


def save_grid(folder: Path, grids: Mapping[str, Grid], recipe: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Write the numbers of a patch sweep, one way, and how they were made."""
    tensors = {f"inputs/{k}": v.cpu().contiguous() for k, v in inputs.items()}
    for name, grid in grids.items():
        numbers = {"values": grid.values, "base": grid.base, "donor": grid.donor}
        tensors |= {f"{what}/{name}": x.cpu().clone() for what, x in numbers.items()}
    one = next(iter(grids.values()))
    axes = {"site": one.site, "layers": one.layers, "positions": one.positions, "parts": one.parts}
    stamp = digest(*(x for item in sorted(tensors.items()) for x in item))
    text = json.dumps(
        {
            "version": VERSION, "axes": axes, "metrics": list(grids), "recipe": recipe, "numbers": stamp,
            "provenance": provenance(),
        },
        indent=1,
    )  # fmt: skip
    write_files(
        folder,
        {"grid.safetensors": lambda to: save_file(tensors, to), "grid.json": lambda to: to.write_text(text + "\n")},
    )


def _read_grid(folder: Path) -> tuple[dict[str, Grid], dict[str, Any], dict[str, Tensor]]:
    if not (folder / "grid.json").exists():
        raise CheckpointError(
            f"{folder} holds no finished grid: run patch_grid(..., path=) again, which goes on from it."
        )
    head = read_json(folder / "grid.json")
    try:
        tensors = load_file(folder / "grid.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/grid.safetensors is damaged ({error}): run patch_grid again.") from None
    if head.get("version") != VERSION or head["numbers"] != digest(*(x for i in sorted(tensors.items()) for x in i)):
        raise CheckpointError(
            f"{folder}: grid.json and grid.safetensors do not belong together, or another version wrote them. "
            "Run patch_grid again: what its groups gave is still there."
        )
    axes = head["axes"]
    layers = tuple(tuple(row) if isinstance(row, list) else row for row in axes["layers"])
    parts = None if axes["parts"] is None else tuple(axes["parts"])
    grids = {}
    for name in head["metrics"]:
        values, base, donor = (tensors[f"{what}/{name}"] for what in ("values", "base", "donor"))
        grids[name] = Grid(values, base, donor, axes["site"], layers, tuple(axes["positions"]), parts)
    inputs = {k.removeprefix("inputs/"): v for k, v in tensors.items() if k.startswith("inputs/")}
    return grids, head["recipe"], inputs


def load_grid(path: str | Path) -> Grid | dict[str, Grid]:
    """The grid that `patch_grid(..., path=)` saved, as it returned it.

    Raises:
        CheckpointError: files that are missing, unfinished or damaged.
    """
    folder = Path(path)
    grids, recipe, _ = _read_grid(folder)
    if recipe["both"]:
        back, *_ = _read_grid(folder / "noising")
        grids = {name: replace(grid, noising=back[name]) for name, grid in grids.items()}
    return grids if recipe["named"] else grids["metric"]


def replay(
    path: str | Path,
    model: Mamba,
    metric: Metric | Mapping[str, Metric],
    *,
    source: Callable[..., Any] | None = None,
    progress: bool = True,
) -> Grid | dict[str, Grid]:
    """Make a saved grid again, from its recipe alone, and see that the numbers are the same.

    Args:
        model, metric: what the sweep was made with. source: of a sweep whose source was a function, that function.
    Returns:
        The grid, made anew.
    Raises:
        CheckpointError: another model, or other numbers, and how far they are off.
    """
    from .patch import patch_grid

    folder = Path(path)
    saved, recipe, inputs = _read_grid(folder)
    if model_digest(model) != recipe["model"]:
        raise CheckpointError(f"{folder} was made with another model: weights, types or sizes differ from this one's.")
    if recipe["source"].startswith("function ") != (source is not None):
        raise EditError(f"the source of {folder} was {recipe['source']}; give source= for a function, and only then.")
    layers = [row if isinstance(row, int) else tuple(row) for row in recipe["layers"]] if recipe["layers"] else None
    parts = {
        name: inputs[f"part/{name}"] if fields is None else fields for name, fields in (recipe["parts"] or {}).items()
    }
    made = patch_grid(
        model, inputs["ids"], inputs.get("donor_ids"), site=recipe["site"],
        metric=metric if isinstance(metric, Mapping) else {"metric": metric},
        layers=layers, positions=recipe["positions"], parts=parts or None, source=source or recipe["source"],
        std=recipe["std"], seed=recipe["seed"], both=recipe["both"], lengths=inputs.get("lengths"),
        backend=recipe["backend"], memory=recipe["memory"], progress=progress,
    )  # fmt: skip
    if made.keys() != saved.keys():
        raise CheckpointError(f"{folder} has the metrics {', '.join(saved)}; these are {', '.join(made)}.")
    for name, grid in made.items():
        for what in ("values", "base", "donor"):
            one, two = getattr(saved[name], what), getattr(grid, what).cpu()
            if not torch.equal(one.isnan(), two.isnan()) or not torch.equal(one.nan_to_num(), two.nan_to_num()):
                off = float((one - two).abs().max())
                raise CheckpointError(
                    f"{folder}: {what} of {name!r} are not the same numbers, up to {off:.3g} apart. They are where "
                    "machine, versions of torch, number of threads and metric are the same."
                )
    return made if isinstance(metric, Mapping) else made["metric"]
