"""What is promised on a GPU: the fused backend beside mamba-ssm's own model, under edits, and in a state sweep.

Without CUDA and the kernels `missing` says what lacks; `--device cpu` rehearses all of it at toy sizes on the backend
`torch`, which proves that the command runs and nothing about speed.
"""

from typing import Any

import torch
from torch import Tensor

from interp import logit_diff, patch_grid
from kernels_bridge.backends import BACKENDS
from kernels_bridge.lively import lively
from minimal_mamba import Mamba, MambaConfig

from . import fused as bench

TARGETS = {  # ratio -> (promised, whether at least or at most)
    "forward over mamba-ssm's": (0.95, "at least"),
    "training step over mamba-ssm's": (0.95, "at least"),
    "8 states set, over clean": (1.3, "at most"),
    "8 states scaled, over clean": (1.3, "at most"),
    "64 states read, over clean": (1.5, "at most"),
    "state sweep, readable over fused": (20.0, "at least"),
}


def missing(device: str) -> str:
    """What lacks for the real measurement on a device, and what to do; empty where nothing does."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is here: run this on a machine with one, or rehearse with --device cpu"
    if device != "cuda":
        return ""
    return "; ".join(f"{need.name} ({need.remedy})" for need in BACKENDS["fused"].missing(torch.device(device)))


def floor(config: MambaConfig, b: int, l: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Milliseconds in which the bytes that a forward must move pass at the device's bandwidth, as a copy has it.

    The weights once; of each layer the residual stream, in_proj's output, the convolution's, dt and y, each written
    once and read once; the logits. Matrix products are given in operations, for the rate of the card at hand.
    """
    size = torch.finfo(dtype).bits // 8
    weights = sum(p.numel() for p in Mamba(config).parameters())
    layer = 2 * b * l * (config.d_model + (2 + 1 + 1 + 1) * config.d_inner)
    moved = size * (weights + config.n_layer * layer + b * l * config.padded_vocab)
    products = 2 * b * l * (weights - config.padded_vocab * config.d_model * (not config.tie_embeddings))
    rate = bench.bandwidth(device)
    return {"bandwidth": rate, "bytes": moved, "bytes_ms": 1e3 * moved / rate, "matrix_product_flop": products}


def sweep(config: MambaConfig, b: int, l: int, rounds: int, device: str, backend: str) -> dict[str, Any]:
    """A whole state sweep, by patch_grid on a backend and by the same through the readable loop on the same device.

    Raises:
        RuntimeError: the two grids do not agree, or nothing is moved: then no time means anything.
    """
    model = lively(Mamba(config)).to(device)
    rng = torch.Generator().manual_seed(2)
    ids, donor = (torch.randint(0, config.vocab_size, (b, l), generator=rng).to(device) for _ in range(2))

    @torch.no_grad()
    def grid(name: str) -> Tensor:
        return patch_grid(
            model, ids, donor, site="ssm_state", metric=lambda x: logit_diff(x, 3, 5), backend=name, progress=False
        ).values

    found, truth = grid(backend), grid("reference")
    gap, effect = float((found - truth).abs().max()), float((truth - truth[0, 0]).abs().max())
    if not gap < 1e-3 * max(1.0, effect) or not effect > 0.01:
        raise RuntimeError(f"the grids differ by {gap} nats, and the largest effect is {effect}")
    times = {
        name: bench._milliseconds(lambda r, name=name: grid(name), rounds)  # type: ignore[misc]
        for name in (backend, "reference")
    }
    ratio = times["reference"]["median"] / times[backend]["median"]
    return {"milliseconds": times, "ratio": ratio, "largest_difference": gap, "largest_effect": effect}


def measure(device: str = "cuda", rounds: int = 20) -> dict[str, Any]:
    """All that is promised, with the floor; at toy sizes where the device is no GPU."""
    real = device == "cuda"
    config = MambaConfig(768, 24, 50277) if real else MambaConfig(16, 2, 32)
    b, l, dtype = (8, 2048, torch.bfloat16) if real else (2, 130, torch.float32)
    backend = "fused" if real else "torch"
    found = bench.measure(config, b, l, rounds, dtype, device, backend)
    found["sweep"] = sweep(config, 4, 32 if real else 8, min(rounds, 3), device, backend)
    found["ratios"]["state sweep, readable over fused"] = found["sweep"]["ratio"]
    return found | {"floor": floor(config, b, l, dtype, device), "backend": backend, "rehearsal": not real}


def table(found: dict[str, Any]) -> str:
    """Times, peaks of memory, then promised and reached."""
    lines = ["a rehearsal: these times say nothing\n"] if found["rehearsal"] else []
    for name, t in found["milliseconds"].items():
        peak = f"{t['peak_gb']:8.2f} GB" if "peak_gb" in t else ""
        lines.append(f"{name:50} {t['median']:9.2f} ms [{t['min']:.2f} .. {t['max']:.2f}] {peak}")
    lines.append(f"{'floor of a forward, bytes at the rate of a copy':50} {found['floor']['bytes_ms']:9.2f} ms\n")
    for name, (promised, kind) in TARGETS.items():
        reached = found["ratios"][name]
        missed = reached < promised if kind == "at least" else reached > promised
        lines.append(f"{name:50} {kind} {promised:5.2f}, reached {reached:7.2f}" + ("  MISSED" if missed else ""))
    return "\n".join(lines)
