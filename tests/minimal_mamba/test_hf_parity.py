"""The readable model against transformers' MambaForCausalLM and FalconMambaForCausalLM: logits and all gradients.

HF casts to float32 inside, so a float64 model of HF's is float32 in places. Two comparisons, then: HF as it is, in
float32, where a gradient can cancel down to the rounding; and HF with its casts widened to float64, where both agree to
the last digits, parameter by parameter.
"""

import dataclasses
import functools
import importlib
import random

import pytest
import torch
from helpers import WideTorch, lively
from torch import Tensor

from kernels_bridge.harness.targets import transformers_model
from minimal_mamba import Mamba, MambaConfig, Ops
from minimal_mamba.block import divided
from minimal_mamba.config import HF_TYPES
from minimal_mamba.scan import READABLE, causal_conv, selective_scan

pytest.importorskip("transformers")
MODELING = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in HF_TYPES]

# Relative Frobenius norm of the logits, and of the gradient of each parameter. Measured over the seeds below: 3e-6 and
# 3e-5 in float32, where HF's own gradients are up to 4e-5 from its float64 ones; 2e-14 and 5e-14 in float64.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-12)}
SEEDS = range(36)
LENGTHS = (1, 2, 7, 63)


def draw(seed: int) -> tuple[MambaConfig, int]:
    """A configuration that HF implements, and a length."""
    rng = random.Random(seed)
    config = MambaConfig(
        d_model=rng.choice([12, 20, 32, 48]),
        n_layer=rng.randint(1, 4),
        vocab_size=rng.choice([11, 29, 64]),
        d_state=rng.choice([1, 5, 16]),
        d_conv=rng.randint(1, 4),
        expand=rng.randint(1, 3),
        dt_rank=rng.choice([1, 3, "auto"]),
        conv_bias=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        norm_eps=rng.choice([1e-5, 1e-3, 0.1]),
        residual_in_fp32=rng.random() < 0.5,
        tie_embeddings=rng.random() < 0.5,
        pad_vocab_size_multiple=1,
        mixer_rms_eps=rng.choice([None, 1e-6, 0.1]),
    )
    if config.mixer_rms_eps == 1e-6 and 1 in (config.d_state, config.rank):  # of one number it leaves the sign alone,
        config = dataclasses.replace(config, mixer_rms_eps=0.1)  # and of its gradient nothing that float32 could show
    return config, LENGTHS[seed % len(LENGTHS)]


def hf_twin(ours: Mamba) -> torch.nn.Module:
    """HF's model with the same weights, its sequential scan and no mambapy."""
    return transformers_model(ours).train()  # the path that has gradients


def measure(model: torch.nn.Module, ids: Tensor, weight: Tensor, **how: Ops) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter of a random linear loss, by the name that ours has."""
    model.zero_grad()
    logits = model(ids, **how).logits
    (logits * weight).sum().backward()
    named = {name.replace("embeddings.", "embedding."): p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach()} | {name: grad.clone() for name, grad in named.items()}


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm().clamp(min=1e-30))


def errors(found: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the logits and of each parameter's gradient."""
    assert found.keys() == want.keys()
    return {name: float((found[name] - true).norm() / true.norm().clamp(min=1e-30)) for name, true in want.items()}


def disagreements(off: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What is outside its bound; empty if the two models agree."""
    logits, gradient = BOUNDS[dtype]
    return {name: err for name, err in off.items() if not err <= (logits if name == "logits" else gradient)}


def pair(seed: int) -> tuple[Mamba, torch.nn.Module, Tensor, Tensor]:
    config, length = draw(seed)
    theirs = hf_twin(lively(Mamba(config), seed))
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (5, length), generator=rng)
    return Mamba.from_module(theirs), theirs, ids, torch.randn(5, length, config.vocab_size, generator=rng)


def no_scan(*args, **how):
    y, h = selective_scan(*args, **how)
    return y * 0, h


def no_recurrence(u, dt, A, *args, **how):
    return selective_scan(u, dt, A * 0 - 1e6, *args, **how)


NO_SCAN = Ops("no scan", causal_conv, no_scan)
NO_RECURRENCE = Ops("no recurrence", causal_conv, no_recurrence)


@torch.no_grad()
def swap_b_and_c(model: Mamba) -> Mamba:
    """B takes the rows of C, and C those of B, in the last layer."""
    r, n = model.config.rank, model.config.d_state
    x_proj = model.backbone.layers[-1].mixer.x_proj.weight
    x_proj[r:] = x_proj[r:].roll(n, 0)
    return model


@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_hf_in_float32(seed):
    ours, theirs, ids, weight = pair(seed)
    found, want = measure(ours, ids, weight), measure(theirs, ids, weight)
    assert not disagreements(errors(found, want), torch.float32)
    # as one vector to 1e-5, or, where HF's float32 is further than that from float64, to twice its error
    truth = measure(ours.double(), ids, weight.double())  # which is HF's, by the next test
    ours_flat, hf_flat, true = (
        torch.cat([m[n].flatten() for n in want if n != "logits"]) for m in (found, want, truth)
    )
    assert relative(ours_flat, hf_flat) <= max(1e-5, 2 * relative(hf_flat.double(), true))


@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_hf_in_float64(seed, monkeypatch):
    """Every cast to float32 in HF's code goes to float64 here; its equations stay as they are."""
    ours, theirs, ids, weight = pair(seed)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for modeling in MODELING:
        monkeypatch.setattr(modeling, "torch", WideTorch())
    want = measure(theirs.double(), ids, weight.double())
    assert {tensor.dtype for tensor in want.values()} == {torch.float64}
    off = errors(measure(ours.double(), ids, weight.double()), want)
    assert not disagreements(off, torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_scan_carries_the_logits(seed):
    """Without this the comparison above is blind: under HF's default weights the scan makes an eighth of the logits."""
    ours, _, ids, _ = pair(seed)
    with torch.no_grad():
        full, without = ours(ids).logits, ours(ids, ops=NO_SCAN).logits
    share = float((full - without).norm() / full.norm())
    assert share > 0.3


@pytest.mark.parametrize("fault", ["no scan", "no recurrence", "B and C swapped"])
@pytest.mark.parametrize("seed", [s for s in SEEDS if s % len(LENGTHS) > 0])  # one token has no recurrence
def test_a_faulty_scan_fails_the_comparison(seed, fault):
    ours, theirs, ids, weight = pair(seed)
    ops = {"no scan": NO_SCAN, "no recurrence": NO_RECURRENCE}.get(fault, READABLE)
    if fault == "B and C swapped":
        swap_b_and_c(ours)
    off = errors(measure(ours, ids, weight, ops=ops), measure(theirs, ids, weight))
    assert {"logits", "backbone.layers.0.mixer.A_log"} <= disagreements(off, torch.float32).keys()
    assert off["logits"] > 1e-2  # by far, not by rounding


def test_the_draws_cover_every_choice():
    configs = [draw(seed)[0] for seed in SEEDS]
    for name, values in {
        "d_conv": {1, 2, 3, 4}, "expand": {1, 2, 3}, "d_state": {1, 5, 16}, "n_layer": {1, 2, 3, 4},
        "conv_bias": {True, False}, "bias": {True, False}, "tie_embeddings": {True, False},
        "residual_in_fp32": {True, False}, "dt_rank": {1, 3, "auto"}, "norm_eps": {1e-5, 1e-3, 0.1},
        "mixer_rms_eps": {None, 1e-6, 0.1},
    }.items():  # fmt: skip
        assert {getattr(config, name) for config in configs} == values, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_16_bits_are_divided_by_is_taken_in_32(dtype):
    """The square of 300 is more than float16 holds; only the quotient is as narrow as what is given."""
    falcon = MODELING[HF_TYPES.index("falcon_mamba")]
    if hasattr(falcon, "FalconMambaWeightlessRMSNorm"):
        norm = falcon.FalconMambaWeightlessRMSNorm(7, eps=1e-3)
    else:  # before 5.15
        norm = functools.partial(falcon.rms_forward, variance_epsilon=1e-3)
    x = (300 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert torch.equal(divided(x, 1e-3), norm(x)) and divided(x, 1e-3).dtype == dtype


def test_hf_generates_what_ours_scores():
    """HF's step-by-step path from its cache gives the tokens that our full forward ranks first."""
    ours, theirs, ids, _ = pair(3)
    out = theirs.eval().generate(ids[:, :7], max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=-1)
    with torch.no_grad():
        ranked = ours(out).logits.argmax(-1)
    assert torch.equal(out[:, 7:], ranked[:, 6:-1])
