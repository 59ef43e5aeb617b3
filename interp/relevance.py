"""Layer-wise relevance propagation: how a metric's value is shared out among the places that it was computed from.

The run is made linear in the residual stream, with all its values kept, and relevance is

    R = site * dMetric/dSite        of the linear run

There is no second model: it is the one forward, in which
- a norm's denominator is a constant (the centring of a LayerNorm, which is linear, is not);
- SiLU(x) = x sigmoid(x) has a constant sigmoid;
- the scan's coefficients dt, A, B and C are constants, so that it is linear in its input u and in the state before it;
- of gated = ssm_out * gate each factor takes half.
Weights share out by what they let through (LRP-0, or gradient x input), and biases keep their share.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kernels_bridge import resolve
from minimal_mamba import Address, Apply, Edit, Mamba, MambaState, at
from minimal_mamba.errors import EditError, NotReached
from minimal_mamba.scan import Ops

from .run import Gradients, Lengths, Metric, differentiate, each, known, named

CONSTANT = ("dt_low", "dt", "B", "C", "decay")  # the scan's coefficients, and what only they are made of


@dataclass(frozen=True, eq=False, repr=False)
class Relevance(Gradients):
    """`relevance_[address]`: the relevance of a place in the shape that the address records, in the metric's unit.

    Args:
        values: (b,) the metric.
        state: of the carried memory, if there was one: relevance in the place of each of its numbers.
    """

    state: MambaState | None = None
    kind: ClassVar[str] = "relevance"

    def summed(self, address: Address) -> Tensor:
        """Summed over the features: one number of each layer, row and position, as ([layers,] b, [positions])."""
        found = self[address]
        features = sum(not isinstance(chosen, int) for chosen in address.features)
        return found.sum(tuple(range(-features, 0))) if features else found


def relevance(
    model: Mamba,
    ids: Tensor,
    metric: Metric,
    wrt: Address | Iterable[Address],
    edits: Edit | Iterable[Edit] = (),
    backend: str = "auto",
    state: MambaState | None = None,
    lengths: Lengths = None,
) -> Relevance:
    """Share a metric out among the values of any sites, from one forward and one backward.

        sum over a cut of R = metric - what the biases after the cut keep

    A cut is all that the rest of the run is computed from: `embed`, or `resid_post` of one layer, at all positions, and
    of a carried state its parts in the layers after. This holds for a metric that is linear in the logits, as
    `logit_diff`; else the sum is that of logits * dMetric/dlogits. Without biases (`bias=False`, `conv_bias=False`,
    RMSNorm) nothing is kept, and the sum is the metric.

    Trust it to rank words and places of the residual stream where the answer is certain and a gradient is flat. Not for
    sizes: an answer that needs several words is shared out among them, and each of them may cost all of it. And not for
    states. Held against zeroing one cell at a time in a model that ships, Pearson's r is 0.80 for words, 0.76 for the
    stream and 0.47 for `ssm_state`; of gradient x input 0.02, -0.16 and 0.64 (analyses/methods/README.md).

    Args:
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        wrt: an address, or several, of values that carry relevance: not dt, B, C and what they are made of.
        edits: they act before relevance is read. A function shares out by gradient x input, its SiLU and norms by the
            rules.
    Returns:
        Relevance, zero where the metric does not depend on the site and on padding.
    Raises:
        EditError: an address of a constant. What `gradients` raises.
    Cost: that of `gradients`, line by line: the fused block does not run.
    Source: Jafari et al. 2024, MambaLRP (arXiv:2406.07592), its rules for SiLU, the selective SSM and the gate; code @
        b4462a5. Differs: the fast paths give what the readable model gives (there SiLU has no rule on CUDA); padding,
        carried states, edits and every site; LRP-0 alone, without its gamma rule for linear layers.
    """
    places = named(wrt)
    for place in places:
        if place.site in CONSTANT:
            raise EditError(
                f"{place}: {place.site} is a constant of the linear run and carries no relevance, which u, ssm_state "
                "and state_write do. What it does to the metric, gradients or a patch can say."
            )
    known(model)
    rules = _Rules()
    linear = _linear(resolve(backend, model.device))
    gate = Apply(at.gated(), _half)
    memory: list[Tensor] = []
    if state is not None:
        model.check(ids, lengths, state)
        with torch.inference_mode(False):
            memory = [s.detach().clone().requires_grad_() for s in (*state.ssm_state, *state.conv_state)]
        state = _as_state(memory, state)
    found, more, done = differentiate(
        model, ids, metric, places, [gate, *each(edits, Edit)], linear, state, lengths, record=places, also=memory,
        within=rules,
    )  # fmt: skip
    rules.check(model)
    shares = {place: _product(done.records[place], found.records[place]) for place in places}
    if state is not None:
        state = _as_state([_product(s, g) for s, g in zip(memory, more, strict=True)], state)
    return Relevance(found.values, shares, state)


def _as_state(parts: Sequence[Tensor], like: MambaState) -> MambaState:
    n = len(like.ssm_state)
    return MambaState(tuple(parts[:n]), tuple(parts[n:]), like.position)


def _product(value: Tensor, slope: Tensor) -> Tensor:
    """Zero where the metric does not depend on the value, which of padding is NaN."""
    return torch.where(slope == 0, 0.0, value.detach() * slope)


# -- the rules --------------------------------------------------------------------------------------------------------


def _with_slope(value: Tensor, linear: Tensor) -> Tensor:
    """The value to the bit, with the gradient of what it is equal to."""
    return value.detach() + (linear - linear.detach())


def _half(gated: Tensor) -> Tensor:
    return _with_slope(gated, gated / 2)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x).detach()


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x * torch.rsqrt(x.square().mean(_axes(shape), keepdim=True) + eps).detach()
    return scaled if weight is None else scaled * weight


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _rms_norm(x - x.mean(_axes(shape), keepdim=True), shape, weight, eps)


def _axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


_RULES: dict[Any, Callable[..., Tensor]] = {F.silu: _silu, F.rms_norm: _rms_norm, F.layer_norm: _layer_norm}


class _Rules(TorchFunctionMode):
    """While it is entered, the three functions keep their values and have the gradients of their rules."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = dict.fromkeys(_RULES, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _RULES:
            return func(*args, **kwargs)
        self.seen[func] += 1
        inplace = kwargs.pop("inplace", False)  # of a SiLU, in an edit's function
        found = _with_slope(func(*args, **kwargs), _RULES[func](*args, **kwargs))
        return args[0].copy_(found) if inplace else found

    def check(self, model: Mamba) -> None:
        """Raise NotReached where a backend made one of them by other means: its gradient would be the plain one."""
        layers, inner = model.config.n_layer, 0 if model.config.mixer_rms_eps is None else 3
        met = self.seen[F.silu], self.seen[F.rms_norm] + self.seen[F.layer_norm]
        there = 2 * layers, (1 + inner) * layers + 1
        if any(m < t for m, t in zip(met, there, strict=True)):  # an edit's function may have more
            raise NotReached(
                f"the rules of relevance met {met[0]} SiLU and {met[1]} norms; {layers} layers have {there[0]} and "
                f"{there[1]}. A backend that makes them by itself has no rules for them: use backend='reference'."
            )


def _linear(ops: Ops) -> Ops:
    """The operations of a backend with constant coefficients, and none that does several lines of the forward."""

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        return ops.scan(u, dt.detach(), A.detach(), B.detach(), C.detach(), h, **how)

    def begin(*given: Any) -> Ops:
        assert ops.begin is not None
        return _linear(ops.begin(*given))

    return replace(ops, scan=scan, block=None, step=None, add_norm=None, begin=None if ops.begin is None else begin)
