"""The fused backend on a GPU: against mamba-ssm's own model, and the ways in which edits can be had, side by side.

Times are medians of CUDA events after a warm-up, over ids that differ between rounds; memory is the peak of one more.
`measure` is what `python -m analyses.benchmarks gpu` calls; on another device it rehearses, on any backend and without
mamba-ssm's model.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels_bridge import resolve
from kernels_bridge.fused import load, ops
from kernels_bridge.fused.virtual import Program
from kernels_bridge.harness.rows import relative
from kernels_bridge.lively import lively
from kernels_bridge.torch_ops import stretches
from minimal_mamba import Edit, Mamba, MambaConfig, Plan, Scale, Set, at
from minimal_mamba.address import Address
from minimal_mamba.provenance import provenance


def _milliseconds(call: Callable[[int], object], rounds: int) -> dict[str, float]:
    """Median, least and most of `call(round)`, after three that warm up; and the peak of memory of one more, in GB."""
    for r in range(3):
        call(r % rounds)
    times = []
    if not torch.cuda.is_available():
        for r in range(rounds):
            begin = time.perf_counter()
            call(r)
            times.append(1e3 * (time.perf_counter() - begin))
        return {"median": statistics.median(times), "min": min(times), "max": max(times)}
    for r in tqdm(range(rounds), leave=False):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(r)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "peak_gb": peak}


@cache
def bandwidth(device: str) -> float:
    """Bytes a second, read and written, that a copy moves on this device: what a floor is reckoned with."""
    x = torch.zeros(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2e3 * x.numel() / _milliseconds(lambda r: y.copy_(x), 10)["median"]


def _call(way: Callable[[], object], r: int) -> object:
    return way()


def models(config: MambaConfig, dtype: torch.dtype, device: str = "cuda") -> tuple[Mamba, Any]:
    """Ours and mamba-ssm's with the same weights; for a rehearsal ours twice."""
    if device != "cuda":
        return lively(Mamba(config).to(dtype)), lively(Mamba(config).to(dtype))
    from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    ours = lively(Mamba(config).to(dtype)).cuda()
    theirs = MambaLMHeadModel(TheirConfig(**config.to_mamba_ssm()), device="cuda", dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def measure(
    config: MambaConfig | None = None, b: int = 8, l: int = 2048, rounds: int = 20, dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda", backend: str = "fused",
) -> dict[str, Any]:  # fmt: skip
    """Forward and training step against mamba-ssm's, edits and recordings against clean, milliseconds and gigabytes.

    Args:
        config: mamba-130m's if None. b, l: batch and length. rounds: timed calls of each.
    Returns:
        name -> times; `ratios`, the numbers that are promised; `ways`, one layer's scan by each way; provenance.
    """
    config = config or MambaConfig(768, 24, 50277)
    ours, theirs = models(config, dtype, device)
    fused = resolve(backend, device)
    ids = torch.randint(0, config.vocab_size, (rounds, b, l), generator=torch.Generator().manual_seed(0)).to(device)
    p8, p64 = (torch.linspace(1, l - 2, m).long().tolist() for m in (8, 64))
    half = torch.tensor(0.5)
    donor = torch.randn(1, 1, 8, config.d_inner, config.d_state, generator=torch.Generator().manual_seed(1)).to(device)

    @torch.no_grad()
    def forward(edits: list[Edit], record: list[Address], r: int) -> None:
        zero = torch.zeros(b, dtype=torch.long)
        plan = Plan(config, edits, record, zero, zero + l)
        ours(ids[r], tap=plan, ops=fused)
        plan.results()

    def step(model: Any, **kw: Any) -> Callable[[int], None]:
        def call(r: int) -> None:
            model.zero_grad()
            logits = model(ids[r], **kw).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[r][:, 1:].flatten()).backward()

        return call

    @torch.no_grad()
    def clean(model: Any, **kw: Any) -> Any:
        return model(ids[0, :2], **kw).logits

    # judged in float32: two roundings of 24 layers to 16 bits may lie a quarter of the logits apart
    single = ours, theirs
    if dtype != torch.float32:
        single = models(config, torch.float32, device)
    gap = relative(clean(single[0], ops=fused), clean(single[1]))
    if not gap < 1e-3:
        raise RuntimeError(f"the logits differ from mamba-ssm's by {gap}, relative in norm: no time means anything")
    del single
    work: dict[str, Callable[[int], object]] = {
        "forward, mamba-ssm": torch.no_grad()(lambda r: theirs(ids[r])),
        "forward, fused": lambda r: forward([], [], r),
        "forward, fused, 8 states set in every layer": lambda r: forward([Set(at.ssm_state(pos=p8), donor)], [], r),
        "forward, fused, 8 states scaled in every layer": lambda r: forward([Scale(at.ssm_state(pos=p8), half)], [], r),
        "forward, fused, 64 states read in every layer": lambda r: forward([], [at.ssm_state(pos=p64)], r),
        "training step, mamba-ssm": step(theirs),
        "training step, fused": step(ours, ops=fused),
    }
    times = {name: _milliseconds(call, rounds) for name, call in work.items()}
    median = {name: t["median"] for name, t in times.items()}
    base = median["forward, fused"]
    return {
        "milliseconds": times,
        "ratios": {
            "forward over mamba-ssm's": median["forward, mamba-ssm"] / base,
            "training step over mamba-ssm's": median["training step, mamba-ssm"] / median["training step, fused"],
            "8 states set, over clean": median["forward, fused, 8 states set in every layer"] / base,
            "8 states scaled, over clean": median["forward, fused, 8 states scaled in every layer"] / base,
            "64 states read, over clean": median["forward, fused, 64 states read in every layer"] / base,
        },
        "logits against mamba-ssm's, relative": gap,
        f"logits against mamba-ssm's in {str(dtype).removeprefix('torch.')}": relative(
            clean(ours, ops=fused), clean(theirs)
        ),
        "ways": ways(config, b, l, rounds) if device == "cuda" else {},
        "provenance": provenance(dtype=str(dtype), b=b, l=l, rounds=rounds),
    }


def ways(config: MambaConfig, b: int = 8, l: int = 2048, rounds: int = 20, m: int = 8) -> dict[str, Any]:
    """One layer's scan in float32 with m states put in place: stretches, the closed form, virtual tokens in one scan.

    All must agree, or no time means anything. The floor is the bytes of u, dt and y, once, at `bandwidth`.
    """
    k, e, n = load(), config.d_inner, config.d_state
    g = torch.Generator("cuda").manual_seed(0)
    u, z = (torch.randn(b, l, e, device="cuda", generator=g) for _ in range(2))
    dt, A = 0.1 * z.abs(), -torch.rand(e, n, device="cuda", generator=g) - 0.5
    B, C = (torch.randn(b, l, n, device="cuda", generator=g) for _ in range(2))
    new = torch.randn(m, b, e, n, device="cuda", generator=g)
    places = torch.linspace(1, l - 2, m).long().tolist()
    blank = torch.zeros(b, e, n, device="cuda")

    def virtual() -> Tensor:
        program = Program(u, dt, A, B, C)
        for first, stop, touched in stretches(l, places):
            program.replace(first, new[places.index(first)]) if touched else program.tokens(first, stop)
        return program.run(k)[0]

    def cut() -> Tensor:
        ys, h = [], blank
        for first, stop, touched in stretches(l, places):
            if touched:
                h = new[places.index(first)]
                ys.append(torch.einsum("ben,bn->be", h, C[:, first])[:, None])
            else:
                s = slice(first, stop)
                y, h = ops.scan(u[:, s], dt[:, s], A, B[:, s], C[:, s], h, kernels=k, fresh=first == 0)
                ys.append(y)
        return torch.cat(ys, 1)

    def closed() -> Tensor:
        """A clean scan of each stretch from zeros, and what its first state adds to y: C_t . exp(A (S_t - S_0)) h."""
        ys, h = [], blank
        for first, stop, touched in stretches(l, places):
            if touched:
                h = new[places.index(first)]
                ys.append(torch.einsum("ben,bn->be", h, C[:, first])[:, None])
                continue
            s = slice(first, stop)
            y, _ = k.scan(u[:, s], dt[:, s], A, B[:, s], C[:, s])
            total = dt[:, s].cumsum(1)
            for i in range(n):  # one state dimension at a time: (b, l, e, n) is never held
                y = y + C[:, s, None, i] * torch.exp(total * A[:, i]) * h[:, None, :, i]
            ys.append(y)
        return torch.cat(ys, 1)

    made = {"virtual tokens, one scan": virtual, "stretches": cut, "closed form": closed}
    with torch.no_grad():
        truth = made["stretches"]()
        gaps = {name: float((way() - truth).norm() / truth.norm()) for name, way in made.items()}
        times = {name: _milliseconds(partial(_call, way), rounds) for name, way in made.items()}
        times["clean"] = _milliseconds(lambda r: k.scan(u, dt, A, B, C), rounds)
    if bad := {name: gap for name, gap in gaps.items() if not gap < 1e-4}:
        raise RuntimeError(f"the ways do not agree: {bad}")
    return {"milliseconds": times, "against stretches": gaps, "floor_ms": 3e3 * u.numel() * 4 / bandwidth("cuda")}
