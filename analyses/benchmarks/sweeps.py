"""HF's model with our weights, and one cell of a sweep on it: a hook on a layer, or a state replaced in its loop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels_bridge.harness.targets import transformers_model
from minimal_mamba import Mamba

Cell = Callable[[int, int], Tensor]  # layer, position -> (b, v) last logits of the patched run


def hf_twin(model: Mamba, **options: Any) -> Any:
    """HF's model with the same weights and its plain sequential scan; `options` of its configuration."""
    return transformers_model(model, **{"use_cache": False} | options).eval()


def hf_resid(hf: Any, ids: Tensor, donor: Mapping[int, Tensor]) -> Cell:
    """The residual stream patched by a forward hook on a layer; `donor` holds each layer's output (b, l, d)."""

    def cell(layer: int, pos: int) -> Tensor:
        def put(module: nn.Module, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, pos] = donor[layer][:, pos]
            return out

        handle = hf.backbone.layers[layer].register_forward_hook(put)
        try:
            return hf(ids).logits[:, -1]
        finally:
            handle.remove()

    return cell


def hf_state(hf: Any, ids: Tensor, donor: Mapping[int, Tensor]) -> Cell:
    """The state patched inside HF's loop; `donor` holds each layer's states (b, l, e, n)."""

    def cell(layer: int, pos: int) -> Tensor:
        with scan_replaced({(layer, pos): donor[layer][:, pos]}, hf.config.num_hidden_layers):
            return hf(ids).logits[:, -1]

    return cell


@contextmanager
def scan_replaced(states: dict[tuple[int, int], Tensor], n_layer: int) -> Iterator[None]:
    """HF's sequential scan with one line more: at a layer and position the state is replaced.

    Source: transformers.models.mamba.modeling_mamba.mamba_selective_scan, "Recurrent iteration" @ 5.23.0.
    """
    from transformers.models.mamba import modeling_mamba as hf

    calls = 0

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, delta_bias: Tensor, **_: Any
    ) -> Tensor:
        nonlocal calls
        layer, calls = calls % n_layer, calls + 1
        dt = nn.functional.softplus(dt + delta_bias.to(dt.dtype)[..., None])
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        discrete_A = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
        deltaB_u = dt[:, :, :, None] * B[:, None, :, :].float() * x[:, :, :, None].float()
        state = torch.zeros(*x.shape[:2], A.shape[-1], dtype=x.dtype)
        outputs = []
        for index in range(x.shape[2]):
            state = discrete_A[:, :, index] * state + deltaB_u[:, :, index]
            state = states.get((layer, index), state)  # the line more
            outputs.append(torch.matmul(state.to(x.dtype), C[:, index, :].unsqueeze(-1))[:, :, 0])
        y = torch.stack(outputs, dim=-1) + x * D[None, :, None]
        return y * nn.functional.silu(z)

    plain = hf.mamba_selective_scan
    hf.mamba_selective_scan = scan
    try:
        yield
    finally:
        hf.mamba_selective_scan = plain
