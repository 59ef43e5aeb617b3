"""Whole patch grids on the CPU: ours, one run a cell, and HF's model, one forward a cell.

One process, one state dict under which the scan carries the logits. Before any time is taken every way of making the
grid is held against every other; then the peers run a few cells a round, in turn with ours and with one another, since
a whole grid of theirs takes minutes, and the median cell times the number of cells is what the grid takes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from interp import Set, at, logit_diff, patch_grid, run
from minimal_mamba import Mamba, MambaConfig

from .cpu import _hf_fields, lively

SIZES = {"S": (128, 4), "M": (768, 6)}  # name -> (d_model, n_layer)
SITES = ("ssm_state", "resid_post")
AGREE = 1e-4  # nats, beside effects of some nats, in float32
OURS, ALONE, HF = "mambascope sweep", "mambascope, one run a cell", "HF transformers, one forward a cell"

Cell = Callable[[int, int], Tensor]  # layer, position -> (b, v) last logits of the patched run


def hf_twin(model: Mamba) -> Any:
    """HF's model with the same weights and its plain sequential scan."""
    from transformers import MambaConfig as HFConfig
    from transformers import MambaForCausalLM

    hf: Any = MambaForCausalLM(HFConfig(**_hf_fields(model), use_cache=False))
    hf = hf.to(model.dtype)  # before the weights are copied, which would else be rounded
    hf.load_state_dict({k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()})
    return hf.eval()


def hf_resid(hf: Any, ids: Tensor, donor: dict[int, Tensor]) -> Cell:
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


def hf_state(hf: Any, ids: Tensor, donor: dict[int, Tensor]) -> Cell:
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


def ways(model: Mamba, hf: Any, ids: Tensor, donor_ids: Tensor, site: str) -> dict[str, Cell]:
    """The peers' ways of one cell, and our plain one."""
    n, where = model.config.n_layer, getattr(at, site)
    made = run(model, donor_ids, record=[where(layer=i) for i in range(n)], last_only=True)
    donor = {i: made[where(layer=i)] for i in range(n)}

    def alone(layer: int, pos: int) -> Tensor:
        place = where(layer=layer, pos=pos)
        return run(model, ids, Set(place, donor[layer][:, pos]), last_only=True).logits[:, 0]

    theirs = hf_resid if site == "resid_post" else hf_state
    return {ALONE: alone, HF: theirs(hf, ids, donor)}


@torch.no_grad()
def measure(
    size: str = "S", batch: int = 8, length: int = 64, site: str = "ssm_state", *, rounds: int = 5, cells: int = 4,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a whole grid of layers x positions, and ratios to ours.

    Args:
        rounds: each is one sweep of ours and `cells` cells of every other way, in turn.
    Returns:
        The least agreement, seconds (median, min, max) of each way, the ratio to the fastest peer.
    Raises:
        RuntimeError: ways that do not agree: then no time means anything.
    """
    d_model, n_layer = SIZES[size]
    model = lively(MambaConfig(d_model, n_layer, vocab_size=512), seed)
    rng = torch.Generator().manual_seed(seed)
    ids, donor_ids = (torch.randint(0, 512, (batch, length), generator=rng) for _ in range(2))
    hf = hf_twin(model)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, 3, 5)

    def ours() -> Tensor:
        return patch_grid(model, ids, donor_ids, site=site, metric=metric, progress=False).values

    others, grid = ways(model, hf, ids, donor_ids, site), ours()
    order = torch.randperm(n_layer * length, generator=rng).tolist()
    places = [divmod(order[i % len(order)], length) for i in range(rounds * cells)]
    plain = metric(run(model, ids, last_only=True).logits)
    effect = float((grid - plain).abs().max())
    off = {
        name: max(float((metric(cell(*p)[:, None]) - grid[p]).abs().max()) for p in places[:cells])
        for name, cell in others.items()
    }
    if not max(off.values()) < AGREE * max(1.0, effect) or not effect > 0.1:
        raise RuntimeError(f"the ways of making the grid do not agree: {off} nats, the largest effect {effect}")
    tqdm.write(f"{site} {size} b{batch} l{length}: agree to {max(off.values()):.1e} of effects up to {effect:.2g} nats")
    times: dict[str, list[float]] = {OURS: [], **{name: [] for name in others}}
    for r in tqdm(range(rounds), desc=f"{site} {size} b{batch} l{length}"):
        begin = time.perf_counter()
        ours()
        times[OURS].append(time.perf_counter() - begin)
        for place in places[r * cells : (r + 1) * cells]:
            for name, cell in others.items():
                begin = time.perf_counter()
                cell(*place)
                times[name].append((time.perf_counter() - begin) * n_layer * length)
    median = {name: statistics.median(t) for name, t in times.items()}
    return {
        "work": f"{site} sweep {size}, batch {batch}, length {length}",
        "cells": n_layer * length,
        "seconds": {n: {"median": median[n], "min": min(t), "max": max(t)} for n, t in times.items()},
        "ratio_to_ours": {n: median[n] / median[OURS] for n in median if n != OURS},
        "fastest_peer": HF,
        "speedup": median[HF] / median[OURS],
        "largest_difference": off,
        "largest_effect": effect,
        "rounds": rounds,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """A table: seconds of a grid, and how many times longer the others take."""
    others = list(dict.fromkeys(n for r in results for n in r["ratio_to_ours"]))
    lines = ["| grid | cells | ours | " + " | ".join(others) + " |", "|---|---|---|" + "---|" * len(others)]
    for r in results:
        shown = [f"{r['ratio_to_ours'][n]:.1f}x" for n in others]
        lines.append(
            f"| {r['work']} | {r['cells']} | {r['seconds'][OURS]['median']:.2f} s | " + " | ".join(shown) + " |"
        )
    return "\n".join(lines)


def everything(size: str = "S", rounds: int = 3) -> list[dict[str, Any]]:
    """Both sites, batch 1 and 8, length 64 and 256, on one thread."""
    torch.set_num_threads(1)
    return [measure(size, b, l, site, rounds=rounds) for site in SITES for b in (1, 8) for l in (64, 256)]
