"""Where a result comes from: versions, machine, commit; and which model, by its digest."""

import contextlib
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import Mamba

PACKAGES = (
    "mambascope", "torch", "triton", "transformers", "accelerate", "mamba-ssm", "causal-conv1d", "mambapy", "numpy",
    "numba", "einops",
)  # fmt: skip


def version(name: str = "mambascope") -> str | None:
    """Of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def provenance(**more: Any) -> dict[str, Any]:
    """What a results file says about how it was made; `more` adds seed, command and the like."""
    found = {name: there for name in PACKAGES if (there := version(name)) is not None}
    return {
        "python": platform.python_version(),
        "packages": found,
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}",
        **_gpu(),
        "commit": _commit(),
        **more,
    }


def digest(*parts: object) -> str:
    """A short hash of tensors, by their bytes, and of everything else, by what it prints."""
    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous()
            made.update(f"{tuple(flat.shape)} {flat.dtype}".encode())
            made.update(flat.flatten().view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(part).encode())
        made.update(b"|")
    return made.hexdigest()[:32]


def model_digest(model: Mamba) -> str:
    """Of a model's configuration and weights."""
    return digest(model.config, *(x for name, w in sorted(model.state_dict().items()) for x in (name, w)))


def _gpu() -> dict[str, str]:
    """The CUDA device and what runs it; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["driver"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _commit() -> str:
    """The checkout's commit, marked where its code differs from it, not by results; "unknown" outside a checkout."""
    here = Path(__file__).parent
    code = ["git", "status", "--porcelain", "--untracked-files=all", "--", ":(top)*.py"]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(code, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
