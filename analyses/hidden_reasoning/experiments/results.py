"""Results files: each part is computed once and written at once, so that a command that was stopped goes on.

`provenance` is of the first part; parts that another commit, machine or package made later are listed under `continued`
with their own.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimal_mamba.errors import MambascopeError
from minimal_mamba.files import make_folder, write_json
from minimal_mamba.provenance import digest, provenance

RESULTS = Path(__file__).parents[1] / "results"  # what the study's page is made of
VERSION = 1
Read = dict[str, Any]


class ResultsError(MambascopeError, ValueError):
    """A results file that is not there, or of another version, model or choice of settings."""


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights, of either kind."""
    return digest(*(x for name, w in sorted(model.state_dict().items()) for x in (name, w)))


class Results:
    """A results file that is being made.

    Args:
        path: the file. kind: what it holds. key: all that its numbers depend on, ready for JSON.
    Raises:
        ResultsError: there is a file of another kind, version or key.
    """

    def __init__(self, path: Path, kind: str, key: Mapping[str, Any], *, command: str):
        self.path, self.key = path, json.loads(json.dumps(dict(key)))
        self.here = provenance(command=command, threads=torch.get_num_threads())
        self.made: Read = {"kind": kind, "version": VERSION, "key": self.key, "parts": {}, "provenance": self.here}
        if path.exists():
            there = read(path, kind)
            differs = [k for k in {**there["key"], **self.key} if there["key"].get(k) != self.key.get(k)]
            if differs:
                shown = ", ".join(f"{k}={there['key'].get(k)!r} (now {self.key.get(k)!r})" for k in differs)
                raise ResultsError(f"{path} holds results with {shown}; delete it, or name another file with --out.")
            self.made = there

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """A part of the results: from the file, or computed now and written."""
        if name not in self.made["parts"]:
            make_folder(self.path.parent)
            self.made["parts"][name] = plain(compute())
            self._sign(name)
            write_json(self.path, self.made)
        return self.made["parts"][name]

    def _sign(self, part: str) -> None:
        if self.here == self.made["provenance"]:
            return
        later = self.made.setdefault("continued", [])
        if not later or later[-1]["provenance"] != self.here:
            later.append({"provenance": self.here, "parts": []})
        later[-1]["parts"].append(part)


def read(path: Path, kind: str) -> Read:
    """A results file.

    Raises:
        ResultsError: there is none, or it is of another kind or version.
    """
    if not path.is_file():
        raise ResultsError(f"{path} does not exist; `python -m analyses.hidden_reasoning {kind}` makes it.")
    try:
        made: Read = json.loads(path.read_text())
        found = made["kind"], made["version"]
        if not all(isinstance(made[name], dict) for name in ("key", "parts")):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ResultsError(f"{path} is no results file of this study; delete it and make it again.") from None
    if found != (kind, VERSION):
        raise ResultsError(
            f"{path} holds results of kind {found[0]!r}, version {found[1]}; this is {kind!r}, version {VERSION}. "
            f"Delete it and run `python -m analyses.hidden_reasoning {kind}` again."
        )
    return made


def together(found: Mapping[str, Read]) -> None:
    """Raise ResultsError where results that are drawn together are not of the same model, or of other rules.

    Args:
        found: by name, `<kind>-<model>`.
    """
    seen: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, made in found.items():
        kind, _, about = name.partition("-")
        for what in ("model", "modulus"):
            if what not in made["key"]:
                continue
            group = (what, about if what == "model" else "")
            first, value = seen.setdefault(group, (name, made["key"][what]))
            if value != made["key"][what]:
                raise ResultsError(
                    f"{first} and {name} are of another {what} ({value} and {made['key'][what]}): make one of them "
                    f"again, `python -m analyses.hidden_reasoning {kind}`."
                )


def plain(value: Any) -> Any:
    """Tensors as lists, rounded to six digits, and everything else as JSON takes it."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value
