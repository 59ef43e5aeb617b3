"""Which operations can run here: the table of backends, what each needs, and whether that is present."""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from minimal_mamba.errors import BackendUnavailable, nearest
from minimal_mamba.scan import READABLE, Ops

from .compiled import COMPILED
from .fused import FUSED
from .torch_ops import TORCH


@dataclass(frozen=True)
class Need:
    """Something that a backend needs: its name, whether it is here on a device, and what to do if it is not."""

    name: str
    here: Callable[[torch.device], bool]
    remedy: str


@dataclass(frozen=True)
class Backend:
    """A backend of the table."""

    name: str
    meaning: str
    needs: tuple[Need, ...]
    ops: Ops

    def missing(self, device: torch.device) -> list[Need]:
        """The needs that are not met on this device."""
        return [need for need in self.needs if not need.here(device)]

    def available(self, device: torch.device) -> bool:
        """Whether it can run on this device."""
        return all(need.here(device) for need in self.needs)


_version = cache(importlib.metadata.version)  # of what is missing it keeps nothing


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return _version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _at_least(package: str, oldest: str) -> Callable[[torch.device], bool]:
    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version.split("+")[0])][:3]

    def here(device: torch.device) -> bool:
        found = installed(package)
        return found is not None and numbers(found) >= numbers(oldest)

    return here


def _extension(module: str, package: str) -> Callable[[torch.device], bool]:
    """Whether an installed package's extension module is there as a file: one that something else put into
    `sys.modules` is none.
    """

    def here(device: torch.device) -> bool:
        if installed(package) is None:
            return True  # it is the package that is missing
        if module in sys.modules:
            return getattr(sys.modules[module], "__file__", None) is not None
        return importlib.util.find_spec(module) is not None

    return here


_INSTALL = "pip install --no-build-isolation 'mambascope[cuda]', on a machine with CUDA and nvcc"
_BUILT = f"it was installed without CUDA; uninstall it, then {_INSTALL}"
_FUSED_NEEDS = (
    Need("a model on a CUDA device", lambda device: device.type == "cuda", "move the model with model.to('cuda')"),
    # older ones do not import beside transformers 5
    Need("the package mamba-ssm, 2.3.1 or newer", _at_least("mamba-ssm", "2.3.1"), _INSTALL),
    Need("mamba-ssm's extension", _extension("selective_scan_cuda", "mamba-ssm"), _BUILT),
    Need("the package causal-conv1d, 1.5.3 or newer", _at_least("causal-conv1d", "1.5.3"), _INSTALL),
    Need("causal-conv1d's extension", _extension("causal_conv1d_cuda", "causal-conv1d"), _BUILT),
)


@cache
def _imports(module: str) -> bool:
    """Whether a module can be imported: numba refuses a newer NumPy than it knows only then."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


_COMPILED_NEEDS = (
    Need("a model on the CPU", lambda device: device.type == "cpu", "move the model with model.to('cpu')"),
    Need("the package numba, 0.61 or newer", _at_least("numba", "0.61"), "pip install 'mambascope[fast]'"),
    Need(
        "a numba that can be imported",
        lambda device: not _at_least("numba", "0.61")(device) or _imports("numba"),
        "`python -c 'import numba'` says why it cannot; most often NumPy is newer than it knows",
    ),
)

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("reference", "the readable model, one step a line", (), READABLE),
        Backend("torch", "plain PyTorch in blocks that fit the cache; any device", (), TORCH),
        Backend("compiled", "loops that numba compiles for this CPU", _COMPILED_NEEDS, COMPILED),
        Backend("fused", "mamba-ssm's and causal-conv1d's CUDA kernels", _FUSED_NEEDS, FUSED),
    )
}


def resolve(name: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The operations of a backend; "auto" is the fastest that is available on this device.

    On the CPU that is `compiled` where numba is installed, else `torch`: the same to the last digits, all held to the
    same check against float64. `Run.backend` says which it was; name one where results must repeat to the bit.

    Raises:
        BackendUnavailable: an unknown name, or a backend that lacks something here; the text says what, and what to do.
    """
    device = torch.device(device)
    if name == "auto":
        name = next(b for b in ("fused", "compiled", "torch") if BACKENDS[b].available(device))
    if name not in BACKENDS:
        raise BackendUnavailable(
            f"no backend {name!r}.{nearest(str(name), BACKENDS)} There are auto, {', '.join(BACKENDS)}."
        )
    backend = BACKENDS[name]
    if not backend.available(device):
        lacks = "; ".join(f"{names} ({remedy})" for remedy, names in _remedies(backend.missing(device)).items())
        here = [b for b in BACKENDS if not BACKENDS[b].missing(device)]
        raise BackendUnavailable(f"backend={name!r} cannot run on {device}: it lacks {lacks}. Here: {', '.join(here)}.")
    return backend.ops


def _remedies(needs: list[Need]) -> dict[str, str]:
    """What to do, and of which needs it is the remedy."""
    found: dict[str, list[str]] = {}
    for need in needs:
        found.setdefault(need.remedy, []).append(need.name)
    return {remedy: " and ".join(names) for remedy, names in found.items()}


def table(device: torch.device | str = "cpu") -> str:
    """Each backend's meaning and what it lacks on this device; what is installed, and how to get what is missing."""
    device = torch.device(device)
    lines, lacked = list[str](), list[Need]()
    for b in BACKENDS.values():
        missing = b.missing(device)
        lacked += missing
        state = "available" if not missing else "lacks " + "; ".join(n.name for n in missing)
        lines.append(f"{b.name:10} {b.meaning:55} {state}")
    packages = ("torch", "numba", "triton", "mamba-ssm", "causal-conv1d", "transformers")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else str(device)
    lines += ["", f"on {name}, with " + ", ".join(f"{p} {installed(p) or '(none)'}" for p in packages)]
    lines += [f"for {names}: {remedy}" for remedy, names in _remedies(lacked).items()]
    return "\n".join(lines)
