"""Which operations can run here: the table of backends, what each needs, and whether that is present."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minimal_mamba.errors import BackendUnavailable, nearest
from minimal_mamba.scan import READABLE, Ops

from .torch_ops import TORCH


@dataclass(frozen=True)
class Need:
    """Something that a backend needs: its name, whether it is here on a device, and what to do if it is not."""

    name: str
    here: Callable[[torch.device], bool]
    remedy: str


@dataclass(frozen=True)
class Backend:
    """A backend of the table; `ops` is None for one that this version does not have yet."""

    name: str
    meaning: str
    needs: tuple[Need, ...]
    ops: Ops | None

    def missing(self, device: torch.device) -> list[Need]:
        """The needs that are not met on this device."""
        return [need for need in self.needs if not need.here(device)]


def _importable(module: str) -> Callable[[torch.device], bool]:
    return lambda device: importlib.util.find_spec(module) is not None


_INSTALL = "pip install 'mambascope[cuda]' --no-build-isolation on a machine with CUDA"
_CUDA = Need("a model on a CUDA device", lambda device: device.type == "cuda", "move the model with model.to('cuda')")
_MAMBA_SSM = Need("the package mamba_ssm", _importable("mamba_ssm"), _INSTALL)
_CONV1D = Need("the package causal_conv1d", _importable("causal_conv1d"), _INSTALL)
_LATER = Need("a later version of mambascope", lambda device: False, "use backend='torch' until then")

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("reference", "the readable model, one step a line", (), READABLE),
        Backend("torch", "plain PyTorch in blocks that fit the cache; any device", (), TORCH),
        Backend("fused", "mamba-ssm's and causal-conv1d's CUDA kernels", (_CUDA, _MAMBA_SSM, _CONV1D, _LATER), None),
    )
}


def resolve(name: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The operations of a backend; "auto" is the fastest that is available on this device.

    Raises:
        BackendUnavailable: an unknown name, or a backend that lacks something here; the text says what, and what to do.
    """
    device = torch.device(device)
    if name == "auto":
        name = next(b for b in ("fused", "torch") if not BACKENDS[b].missing(device))
    if name not in BACKENDS:
        raise BackendUnavailable(
            f"no backend {name!r}.{nearest(name, BACKENDS)} There are auto, {', '.join(BACKENDS)}."
        )
    backend = BACKENDS[name]
    missing = backend.missing(device)
    if missing or backend.ops is None:
        lacks = "; ".join(f"{need.name} ({need.remedy})" for need in missing)
        here = [b for b in BACKENDS if not BACKENDS[b].missing(device)]
        raise BackendUnavailable(f"backend={name!r} cannot run on {device}: it lacks {lacks}. Here: {', '.join(here)}.")
    return backend.ops


def table(device: torch.device | str = "cpu") -> str:
    """One line a backend: its meaning, and what it lacks on this device."""
    device = torch.device(device)
    lines = []
    for b in BACKENDS.values():
        missing = b.missing(device)
        state = "available" if not missing else "lacks " + "; ".join(n.name for n in missing)
        lines.append(f"{b.name:10} {b.meaning:55} {state}")
    return "\n".join(lines)
