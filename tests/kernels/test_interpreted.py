"""The real Triton kernels that Mamba-1 uses, in Triton's interpreter, and mamba-ssm's own model, against ours."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import error, lively, tiny
from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton import layer_norm, selective_state_update
from torch import Tensor, nn

from interp import run
from kernels_bridge.fused import load
from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.block import LayerNorm, RMSNorm
from minimal_mamba.scan import ssm_step

KERNELS = dataclasses.replace(load(), device="cpu")
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, against float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(
    "kernel",
    [
        selective_state_update._selective_scan_update_kernel,
        layer_norm._layer_norm_fwd_1pass_kernel,
        layer_norm._layer_norm_bwd_kernel,
    ],
)
def test_it_is_the_interpreter(kernel: Any) -> None:
    while hasattr(kernel, "fn") and type(kernel).__name__ != "InterpretedFunction":
        kernel = kernel.fn
    assert type(kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize(("b", "e", "n"), [(1, 1, 1), (2, 24, 5), (3, 40, 16), (1, 33, 33)])
def test_one_step(b: int, e: int, n: int, dtype: torch.dtype) -> None:
    """`selective_state_update`: the state float32, as it is carried, the inputs as they come."""
    h, u, dt = draw(b, e, n), draw(b, e), draw(b, e, seed=1).exp()
    A, B, C = -draw(e, n).exp(), draw(b, n), draw(b, n, seed=2)
    u, B, C = (x.to(dtype).double() for x in (u, B, C))
    h, dt, A = (x.float().double() for x in (h, dt, A))
    want = ssm_step(h, u, dt, A, B, C)
    held = h.float()
    got = KERNELS.scan_step(held, u.float(), dt.float(), A.float(), B.float(), C.float())
    assert torch.equal(held, h.float()), "the state that was given is a value"
    for mine, true in zip(got, want, strict=True):
        assert mine.dtype == torch.float32 and error(mine, true) < FLOOR[torch.float32]
    z = torch.zeros(e)
    raw = selective_state_update.selective_state_update(  # inputs of 16 bits, y in their type
        h.float(), u.to(dtype), dt.to(dtype), A.float(), B.to(dtype), C.to(dtype), D=z, dt_bias=z
    )
    assert raw.dtype == dtype and error(raw, want[1]) < FLOOR[dtype] * (1 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(("b", "l", "d"), [(1, 1, 1), (2, 3, 12), (1, 7, 65)])
def test_add_and_norm(kind: Any, b: int, l: int, d: int, dtype: torch.dtype) -> None:
    """Forward, and the gradients of both summands and of the weights, through the sum and through the norm."""
    if d == 1 and kind is LayerNorm:
        return  # a constant: nothing to see
    exact = kind(d, eps=1e-5).double()
    with torch.no_grad():
        for i, p in enumerate(exact.parameters()):
            p.copy_((1 + draw(d, seed=i)).to(dtype))
    norm = kind(d, eps=1e-5)
    norm.load_state_dict(exact.state_dict())
    norm.to(dtype)
    given = draw(b, l, d).float().double(), draw(b, l, d, seed=1).to(dtype).double()
    weights = draw(b, l, d, seed=2), draw(b, l, d, seed=3)
    leaves, found = {}, {}
    for name, module, types in (("want", exact, (torch.float64,) * 2), ("got", norm, (torch.float32, dtype))):
        leaves[name] = [x.to(t).requires_grad_() for x, t in zip(given, types, strict=True)]
        resid, mixed = leaves[name]
        total, normal = KERNELS.add_norm(resid, mixed, module) if name == "got" else (resid + mixed, None)
        normal = module(total) if normal is None else normal
        loss = (total.double() * weights[0]).sum() + (normal.double() * weights[1]).sum()
        found[name] = [total, normal, *torch.autograd.grad(loss, [resid, mixed, *module.parameters()])]
    assert found["got"][0].dtype == torch.float32 and found["got"][1].dtype == dtype
    for i, (got, want) in enumerate(zip(found["got"], found["want"], strict=True)):
        assert error(got, want) < (FLOOR[torch.float32] if i == 0 else FLOOR[dtype]), i


def test_the_wrapper_drops_the_gradient_of_the_last_state() -> None:
    """Control: it is mamba-ssm's own autograd function that leaves it out, here as on a GPU."""
    u = torch.rand(1, 4, 6, requires_grad=True)
    B = torch.rand(1, 3, 6)
    _, last = selective_scan_fn(u, torch.rand(1, 4, 6), -torch.rand(4, 3), B, B, return_last_state=True)
    assert last.any() and last.requires_grad and not torch.autograd.grad(last.sum(), u)[0].any()


# -- mamba-ssm's model -------------------------------------------------------------------------------------------------


def theirs(config: MambaConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = MambaLMHeadModel(TheirConfig(**config.to_mamba_ssm()), dtype=dtype)
    return model


CONFIGS = {
    "as published": {},
    "layer norm": {"rms_norm": False},
    "an own head": {"tie_embeddings": False},
    "k 4, no conv bias": {"d_conv": 4, "conv_bias": False},
    "biases": {"bias": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_their_model_is_ours(name: str) -> None:
    """The same weights, in their module and taken over from it live: logits, fused and readable, of both."""
    ours = tiny(seed=3, dtype=torch.float32, **CONFIGS[name])
    model = theirs(ours.config)
    model.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 29, (2, 17), generator=torch.Generator().manual_seed(0))
    exact = Mamba(ours.config).double()
    exact.load_state_dict(ours.state_dict())
    want = run(exact, ids, backend="reference").logits
    bound = 4 * error(run(ours, ids, backend="reference").logits, want) + 5e-7
    with torch.no_grad():
        assert error(model(ids).logits, want) <= bound
    live = Mamba.from_module(model)
    assert live.config == ours.config
    for (key, a), b in zip(live.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert live.backbone.embedding.weight.data_ptr() != model.backbone.embedding.weight.data_ptr()
    assert error(run(live, ids, backend="torch").logits, want) <= bound


def test_their_gradients_are_ours() -> None:
    ours = tiny(seed=3, dtype=torch.float32)
    model = theirs(ours.config)
    model.load_state_dict(ours.state_dict())
    exact = Mamba(ours.config).double()
    exact.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = {}
    for module in (model, exact):
        loss = torch.logsumexp(module(ids).logits, -1).square().sum()
        names, params = zip(*module.named_parameters(), strict=True)
        grads[module] = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    assert grads[model].keys() == grads[exact].keys()
    for name, want in grads[exact].items():
        assert error(grads[model][name], want) < 2e-5, name


def test_their_decoding_is_ours() -> None:
    """mamba-ssm's step keeps its state in float32 here; its prompt goes through the scan."""
    from mamba_ssm.utils.generation import InferenceParams

    ours = lively(Mamba(MambaConfig(12, 2, 29, d_state=5, d_conv=3, dt_rank=4)), 3)
    model = theirs(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 29, (2, 7), generator=torch.Generator().manual_seed(0))
    params = InferenceParams(max_seqlen=16, max_batch_size=2)
    steps = []
    with torch.no_grad():
        for t in range(7):
            steps.append(model(ids[:, t : t + 1], inference_params=params).logits)
            params.seqlen_offset += 1
    exact = Mamba(ours.config).double()
    exact.load_state_dict(ours.state_dict())
    assert error(torch.cat(steps, 1), run(exact, ids, backend="reference").logits) < 5e-6
