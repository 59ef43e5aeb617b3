"""Golden vectors: inputs and outputs of the real kernels, recorded on a GPU, replayed anywhere in float64.

python -m kernels_bridge record golden.safetensors      on a machine with CUDA
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimal_mamba.files import make_folder, write_files
from minimal_mamba.provenance import provenance
from minimal_mamba.scan import causal_conv, selective_scan, ssm_step
from minimal_mamba.tap import Tap

from ..harness.check import LENGTHS
from .kernels import Kernels, load

SHORT = 400  # longer cases are recorded in float32 only, and without gradients: the file stays below 3 MB
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, as in the kernels' notes


@dataclass(frozen=True)
class Case:
    """One call: a kernel, a type, and sizes; its inputs are drawn from its name."""

    kind: str  # scan, states, scan_step, conv, conv_step
    dtype: torch.dtype
    l: int
    b: int = 1
    e: int = 3
    n: int = 2
    k: int = 4

    @property
    def name(self) -> str:
        return f"{self.kind}.{str(self.dtype).removeprefix('torch.')}.{self.l}.{self.k}"


def cases() -> Iterator[Case]:
    """All that is recorded."""
    for dtype in BOUND:
        for l in LENGTHS:
            if l <= SHORT or dtype == torch.float32:
                yield Case("scan", dtype, l)
                yield Case("conv", dtype, l)
        for k in (2, 3):
            yield Case("conv", dtype, 17, b=2, e=8, k=k)
        yield Case("conv_step", dtype, 1, b=2, e=8)
    for l in (1, 2, 17, 129):
        yield Case("states", torch.float32, l)
    yield Case("scan_step", torch.float32, 1, b=2, e=33, n=16)


def inputs(case: Case) -> dict[str, Tensor]:
    """Drawn from the case's own name, rounded to its type."""
    rng = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(case.name, 1)))
    b, l, e, n, k = case.b, case.l, case.e, case.n, case.k

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    if case.kind.startswith("conv"):
        made = {"x": draw(b, l, e), "weight": draw(e, k), "bias": draw(e)}
        return {name: x.to(case.dtype) for name, x in (made | {"window": draw(b, e, k)}).items()}
    made = {"u": draw(b, l, e), "dt": 0.3 * draw(b, l, e).exp(), "B": draw(b, l, n), "C": draw(b, l, n)}
    rounded = {name: x.to(case.dtype) for name, x in made.items()}
    return rounded | {"A": -draw(e, n).exp().float(), "h": draw(b, e, n).float()}


def outputs(case: Case, given: dict[str, Tensor], kernels: Kernels | None) -> dict[str, Tensor]:
    """What the kernels give; without them the readable operations, in the type of what is given."""
    with torch.set_grad_enabled(case.l <= SHORT and case.kind in ("scan", "conv")):
        found = _call(case, {name: t.detach().clone().requires_grad_() for name, t in given.items()}, kernels)
    return {name: t.detach() for name, t in found.items()}


def _call(case: Case, x: dict[str, Tensor], kernels: Kernels | None) -> dict[str, Tensor]:
    if case.kind == "scan_step":
        step = (x["h"], x["u"][:, 0], x["dt"][:, 0], x["A"], x["B"][:, 0], x["C"][:, 0])
        h, y = kernels.scan_step(*step) if kernels else ssm_step(*step)
        return {"h": h, "y": y}
    if case.kind == "conv_step":
        if kernels:
            y, window = kernels.conv_step(x["x"][:, 0], x["window"], x["weight"], x["bias"])
        else:
            y, window = causal_conv(x["x"], x["weight"], x["bias"], x["window"])
            y = y[:, 0]
        return {"y": y, "window": window}
    if case.kind == "conv":
        blank = torch.zeros_like(x["window"])
        y = kernels.conv(x["x"], x["weight"], x["bias"]) if kernels else causal_conv(*_conv(x), blank)[0]
        return {"y": y} | _grads(case, y, {i: x[i] for i in ("x", "weight", "bias")})
    blank = torch.zeros_like(x["h"])
    if case.kind == "states":
        if kernels:
            return {"states": kernels.states(x["u"], x["dt"], x["A"], x["B"])}
        tap = _States()
        selective_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], blank, tap=tap)
        return {"states": torch.stack(tap.held, 1)}
    scan = (x["u"], x["dt"], x["A"], x["B"], x["C"])
    y, last = kernels.scan(*scan) if kernels else selective_scan(*scan, blank)
    return {"y": y, "last": last} | _grads(case, y, {i: x[i] for i in ("u", "dt", "A", "B", "C")})


def _conv(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return x["x"], x["weight"], x["bias"]


def _grads(case: Case, y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of y, whose weights are powers of two and so the same in every type."""
    if case.l > SHORT:
        return {}
    weights = 2.0 ** (torch.arange(y.numel(), device=y.device).reshape(y.shape) % 5 - 2)
    found = torch.autograd.grad((y.double() * weights).sum(), [*leaves.values()])
    return {f"d_{name}": grad for name, grad in zip(leaves, found, strict=True)}


class _States(Tap):
    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "ssm_state":
            self.held.append(value)
        return value


def record(path: str | Path, kernels: Kernels | None = None) -> None:
    """Run every case on the kernels, and write inputs and outputs to one safetensors file with its provenance.

    Args:
        kernels: the real ones if None.
    Cost: seconds on a GPU; a file of less than 3 MB.
    """
    k = kernels or load()
    tensors = {}
    for case in cases():
        given = inputs(case)
        made = outputs(case, {name: x.to(k.device) for name, x in given.items()}, k)
        for name, x in (given | {f"out {name}": x for name, x in made.items()}).items():
            tensors[f"{case.name} {name}"] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
    about = {"provenance": json.dumps(provenance() | {"kernels": k.name})}
    path = Path(path)
    write_files(make_folder(path.parent), {path.name: lambda file: save_file(tensors, file, metadata=about)})


def replay(path: str | Path) -> Iterator[tuple[Case, str, float, float]]:
    """(case, quantity, relative error, bound) of each recorded output against the readable operation in float64."""
    with safe_open(str(path), framework="pt") as held:
        for case in cases():
            mine = [key for key in held.keys() if key.startswith(f"{case.name} ")]  # noqa: SIM118
            parts = {key.removeprefix(f"{case.name} "): held.get_tensor(key) for key in mine}
            given = {name: x.double() for name, x in parts.items() if not name.startswith("out ")}
            for name, want in outputs(case, given, None).items():
                got = parts[f"out {name}"].double()
                yield case, name, float((got - want).norm() / want.norm().clamp(min=1e-12)), BOUND[case.dtype]
