"""The operations of a backend, each fed with what the reference computed: conv and scan, forward and backward, and how
changes of the state are carried on.
"""

import torch
from torch import Tensor

from minimal_mamba import Mamba, Ops
from minimal_mamba.block import wide
from minimal_mamba.scan import READABLE
from minimal_mamba.tap import Tap

from ..carry import carry
from .bounds import OPERATION, UPSTREAM, within
from .rows import Row, relative
from .watch import Ours, pulled

CHANGES, FEW = 2, 4  # of the state of each of so many rows at most


class _States(Tap):
    """Records `ssm_state` at some positions, on whichever path the operation takes."""

    def __init__(self, positions: list[int]):
        self.positions = positions
        self.held: dict[int, Tensor] = {}

    def recorded(self, *sites: str) -> list[int]:
        return self.positions if "ssm_state" in sites and len(sites) == 1 else []

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        if site == "ssm_state" and t in self.positions:
            self.held[t] = value
        return value

    def record(self, site: str, values: Tensor, times: "list[int]") -> None:  # type: ignore[override]
        if site == "ssm_state":
            self.held |= {t: values[:, i] for i, t in enumerate(times)}


def operations(case: str, ops: Ops, true: Ours, model: Mamba, ids: Tensor, positions: list[int]) -> list[Row]:
    """Rows of every layer's conv and scan, their outputs and the gradient of every input, and of `carry`.

    The inputs are the reference's, rounded to the type in which the operation gets them in a model of this type; the
    operation in float64 on those rounded inputs is the truth, so that only the operation's own error is seen. The
    state before the first token is drawn, and the last state takes part in the loss.
    """
    seen = true.forward(ids)
    rows = []
    for i, layer in enumerate(model.backbone.layers):
        rng = torch.Generator().manual_seed(i)
        m, dtype, w = layer.mixer, model.dtype, wide(model.dtype)

        def drawn(*shape: int, like: torch.dtype, rng: torch.Generator = rng) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(like).to(ids.device)

        b, e, n, k = len(ids), model.config.d_inner, model.config.d_state, model.config.d_conv
        bias = () if m.conv1d.bias is None else (m.conv1d.bias.detach(),)
        conv = (seen["x", i].to(dtype), m.conv1d.weight.detach().squeeze(1), *bias, drawn(b, e, k, like=dtype))
        steps = seen["dt", i].clone()  # 5e-2 to 2 mostly: a channel of shorter and one of longer ones than any model's
        steps[..., 0] *= 1e-4
        steps[..., -1] *= 30
        u, B, C = (seen[site, i].to(dtype) for site in ("u", "B", "C"))
        scan = (u, steps.to(w), m.A(w).detach(), B, C, drawn(b, e, n, like=w))
        names = ("x", "weight", *("bias",) * len(bias), "window")
        rows += _one(case, "conv", i, ops, conv, names, positions, dtype)
        rows += _one(case, "scan", i, ops, scan, ("u", "dt", "A", "B", "C", "h"), positions, dtype)
        few = slice(FEW)
        delta, gate = drawn(CHANGES, len(ids[few]), e, n, like=w), drawn(*u[few].shape, like=w)
        first = torch.randint(0, u.shape[1], delta.shape[:2], generator=rng).to(ids.device)
        rows.append(_carried(case, i, ops, delta, first, scan[1][few], scan[2], C[few], gate))
    return rows


def _carried(case: str, layer: int, ops: Ops, delta: Tensor, first: Tensor, *run: Tensor) -> Row:
    """How changes of the state (k, b, e, n) before `first` (k, b) go on through a run: dt, A, C and the gate."""
    change = carry if ops.carry is None else ops.carry
    found = change(delta, first, run[0].shape[1], *run)  # (k, b, l, e), counted from `first`
    dt, A, C, gate = (x.double() for x in run)
    h, want = delta.new_zeros(delta.shape, dtype=torch.float64), torch.zeros_like(found, dtype=torch.float64)
    for t in range(dt.shape[1]):
        h = torch.where((first == t)[..., None, None], delta.double(), h) * torch.exp(dt[:, t, :, None] * A)
        k, b = (first <= t).nonzero(as_tuple=True)
        want[k, b, t - first[k, b]] = ((h * C[:, t, None]).sum(-1) * gate[:, t])[k, b]
    beyond = first[..., None] + torch.arange(dt.shape[1], device=first.device) >= dt.shape[1]
    error = relative(torch.where(beyond[..., None] & found.isfinite(), 0, found), want)
    bound = OPERATION[found.dtype]
    return Row(case, "operations", "carry: gated", layer, error, None, None, bound, None, error <= bound)


def _one(
    case: str, name: str, layer: int, ops: Ops, inputs: tuple[Tensor, ...], names: tuple[str, ...],
    positions: list[int], dtype: torch.dtype,
) -> list[Row]:  # fmt: skip
    found = _call(name, ops, inputs, names, positions)
    true = _call(name, READABLE, tuple(x.double() for x in inputs), names, positions)
    rows = []
    for quantity, want in true.items():
        got = found[quantity]
        error = relative(got, want)
        # a state is float32 in a 16-bit model too, and so is its bound, in whatever type it comes
        bound = OPERATION[wide(dtype) if quantity in ("last state", "states") else got.dtype]
        rule = UPSTREAM["gradient" if quantity.startswith("d ") else name].get(dtype)
        fits = rule is None or within(got.double(), want, *rule)
        note = "" if fits else f"outside the kernels' own tolerance {rule}"
        rows.append(Row(case, "operations", f"{name}: {quantity}", layer, error, None, None, bound,
                        None, error <= bound and fits, note))  # fmt: skip
    return rows


def _call(
    name: str, ops: Ops, inputs: tuple[Tensor, ...], names: tuple[str, ...], positions: list[int]
) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    tap = _States(positions)
    if name == "conv":
        x, weight, *bias, window = leaves
        out, last = ops.conv(x, weight, bias[0] if bias else None, window, mask=None, tap=tap)
        found = {"out": out, "last window": last}
    else:
        out, last = ops.scan(*leaves, tap=tap)
        found = {"y": out, "last state": last}
        found["states"] = torch.stack([tap.held[t] for t in positions], 1)
    return pulled(found, dict(zip(names, leaves, strict=True)), seed=7)
