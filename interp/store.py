"""Edits on disk: `edits.json` says what, `edits.safetensors` holds the values."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from minimal_mamba.address import Address, Span, at
from minimal_mamba.edits import KINDS, Apply, Edit, Rows, function_name, import_function
from minimal_mamba.errors import CheckpointError, EditError
from minimal_mamba.files import make_folder, write_files
from minimal_mamba.provenance import provenance
from minimal_mamba.sites import ADDRESSABLE

VERSION = 1


def save_edits(edits: Edit | Iterable[Edit], folder: str | Path) -> None:
    """Write edits to a folder; a failed write leaves it as it was.

    Raises:
        EditError: an `Apply` whose function cannot be imported by name, or something that is no edit.
    """
    edits, folder = list(edits) if isinstance(edits, Iterable) else [edits], Path(folder)
    if wrong := [edit for edit in edits if not isinstance(edit, Edit)]:
        raise EditError(f"save_edits(edits, folder) was given {wrong[0]!r:.60} among the edits.")
    rows: list[dict[str, Any]] = []
    values = {}
    for i, edit in enumerate(edits):
        fields = edit.describe()
        if isinstance(edit, Apply):
            fields["fn"] = function_name(edit.fn)
        row = {
            "kind": type(edit).__name__,
            "address": _address_out(edit.address),
            "rows": _out(edit.rows),
        }
        rows.append(row | {"fields": fields})
        if edit.value is not None:
            values[str(i)] = edit.value.detach().cpu().contiguous()
    make_folder(folder)
    data = save(values)
    head = {"version": VERSION, "values": hashlib.sha256(data).hexdigest(), "edits": rows, "provenance": provenance()}
    text = json.dumps(head, indent=1) + "\n"
    write_files(
        folder, {"edits.safetensors": lambda f: f.write_bytes(data), "edits.json": lambda f: f.write_text(text)}
    )


def load_edits(folder: str | Path) -> list[Edit]:
    """Read what `save_edits` wrote. An `Apply` imports the module that its function was saved from.

    Raises:
        CheckpointError: files that are missing, that another version wrote, or that do not belong together.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / "edits.json").read_text())
        data = (folder / "edits.safetensors").read_bytes()
        version, digest = raw["version"], raw.get("values")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} holds no saved edits: {error!r}. save_edits writes edits.json and edits.safetensors."
        ) from None
    if version != VERSION:
        raise CheckpointError(f"{folder}/edits.json has version {version!r}; this mambascope reads version {VERSION}.")
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{folder}/edits.safetensors is not the file that edits.json was saved with; save the edits again."
        )
    values = load(data)
    edits = []
    for i, row in enumerate(raw["edits"]):
        try:
            kind, fields = KINDS[row["kind"]], dict(row["fields"])
            if kind is Apply:
                fields["fn"] = import_function(fields["fn"])
            if kind.tensor and str(i) in values:
                fields[kind.tensor] = values[str(i)]
            edits.append(kind(_address_in(row["address"]), rows=_in(row["rows"]), **fields))
        except (LookupError, TypeError, ValueError, ImportError, AttributeError) as error:
            raise CheckpointError(f"{folder}: edit {i} cannot be made here: {error!r}.") from None
    return edits


def _out(sel: Rows) -> Any:
    if isinstance(sel, Span):
        return {"slice": [sel.start, sel.stop, sel.step]}
    return list(sel) if isinstance(sel, tuple) else sel


def _in(raw: Any) -> Any:
    if isinstance(raw, dict):
        return Span(*raw["slice"])
    return tuple(raw) if isinstance(raw, list) else raw


def _address_out(address: Address) -> dict[str, Any]:
    place = {"site": address.site, "layer": _out(address.layer), "pos": _out(address.pos)}
    return place | {"features": [_out(f) for f in address.features]}


def _address_in(raw: dict[str, Any]) -> Address:
    spec = getattr(at, raw["site"])  # raises for a site that does not exist here
    axes = ADDRESSABLE[raw["site"]].features
    fields = {"pos": _in(raw["pos"])} | ({} if raw["layer"] is None else {"layer": _in(raw["layer"])})
    chosen = zip(axes, raw["features"], strict=True)
    return spec(**fields, **{axis: _in(f) for axis, f in chosen if axis != "n+k"})
