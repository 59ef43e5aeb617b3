"""Forward and training step on the CPU, beside HF's slow path and mambapy.

One process, one state dict under which the scan carries the logits, rounds interleaved so that the machine's drift hits
all alike. Before any time is taken, each implementation is held against the readable model in float64, and so are three
faulty ones, which must not agree.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kernels_bridge import resolve
from minimal_mamba import Mamba, MambaConfig, Ops
from minimal_mamba.provenance import provenance

SIZES = {"S": (128, 4), "M": (768, 6)}  # name -> (d_model, n_layer)
# The backward of a loop that slices (b, l, e, n) position by position costs O(l^2): minutes a step at length 256.
SQUARE = {"HF transformers", "mambapy sequential"}
WORK = {  # name -> (size, batch, length, train)
    "forward S, batch 8, length 256": ("S", 8, 256, False),
    "training step S, batch 16, length 256": ("S", 16, 256, True),
    "forward S, batch 8, length 64": ("S", 8, 64, False),
    "training step S, batch 16, length 64": ("S", 16, 64, True),
    "forward M, batch 8, length 256": ("M", 8, 256, False),
}
USUAL = list(WORK)[:4]  # what is measured without --all
AGREE = 1e-5  # relative error in norm, float32 against float64

Forward = Callable[[Tensor], Tensor]


def lively(config: MambaConfig, seed: int) -> Mamba:
    """A model whose scan carries the logits: at mamba-ssm's initialisation the layers hardly move the stream.

    Embedding rows have size 1 per channel, and the projections are scaled so that each layer adds about as much again.
    """
    torch.manual_seed(seed)
    model = Mamba(config)
    with torch.no_grad():
        nn.init.normal_(model.backbone.embedding.weight, std=1.0)
        model.lm_head.weight.div_(config.d_model**0.5) if not config.tie_embeddings else None
        for layer in model.backbone.layers:
            m = layer.mixer
            for linear, gain in ((m.in_proj, 2.0), (m.x_proj, 4.0), (m.out_proj, 4.0)):
                nn.init.normal_(linear.weight, std=gain / linear.in_features**0.5)
            nn.init.uniform_(m.D, -0.05, 0.05)  # the skip past the state is kept small
    return model


class Mambapy(nn.Module):
    """mambapy's layers between our embedding, norm and head: its language model needs mamba_ssm to import."""

    def __init__(self, model: Mamba, pscan: bool):
        super().__init__()
        from mambapy.mamba import Mamba as Layers
        from mambapy.mamba import MambaConfig as Config

        c = model.config
        config = Config(d_model=c.d_model, n_layers=c.n_layer, d_state=c.d_state, expand_factor=int(c.expand),
                        d_conv=c.d_conv, pscan=pscan, rms_norm_eps=c.norm_eps)  # fmt: skip
        self.embedding = nn.Embedding(c.padded_vocab, c.d_model)
        self.layers = Layers(config)
        self.norm_f = nn.RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = nn.Linear(c.d_model, c.padded_vocab, bias=False)
        self.layers.load_state_dict(
            {k[len("backbone.") :]: v for k, v in model.state_dict().items() if ".layers." in k}
        )
        self.embedding.load_state_dict(model.backbone.embedding.state_dict())
        self.norm_f.load_state_dict(model.backbone.norm_f.state_dict())
        self.lm_head.load_state_dict(model.lm_head.state_dict())

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm_f(self.layers(self.embedding(ids))))


def peers(model: Mamba) -> dict[str, tuple[nn.Module, Forward]]:
    """name -> (module, ids -> logits), ours first; what cannot be imported is left out."""
    ops = resolve("torch")
    made: dict[str, tuple[nn.Module, Forward]] = {"mambascope torch": (model, lambda ids: model(ids, ops=ops).logits)}
    try:
        from transformers import MambaConfig as HFConfig
        from transformers import MambaForCausalLM

        hf = MambaForCausalLM(HFConfig(**_hf_fields(model)))
        rename = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in model.state_dict().items()}
        hf.load_state_dict(rename)
        made["HF transformers"] = (hf, lambda ids: hf(ids, use_cache=False).logits)
    except ImportError:
        pass
    try:
        for name, pscan in (("mambapy sequential", False), ("mambapy pscan", True)):
            other = Mambapy(model, pscan)
            made[name] = (other, other)
        hf_pscan = MambaForCausalLM(HFConfig(**_hf_fields(model), use_mambapy=True))
        hf_pscan.load_state_dict(rename)
        made["HF use_mambapy"] = (hf_pscan, lambda ids: hf_pscan(ids, use_cache=False).logits)
    except ImportError:
        pass
    return made


def _hf_fields(model: Mamba) -> dict[str, Any]:
    return {k: v for k, v in model.config.to_hf().items() if k != "model_type"}


def faults(model: Mamba) -> dict[str, Forward]:
    """Three wrong models, which a check worth its name must refuse."""
    ops = resolve("torch")

    def no_scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *, tap: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(dt), h

    def forgetful(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *, tap: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.einsum("ble,bln,bln->ble", dt * u, B, C), h

    def swapped(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, *, tap: Any
    ) -> tuple[Tensor, Tensor]:
        return ops.scan(u, dt, A, C, B, h, tap=tap)

    scans = {"scan zeroed": no_scan, "no recurrence": forgetful, "B and C swapped": swapped}

    def under(faulty: Ops) -> Forward:
        return lambda ids: model(ids, ops=faulty).logits

    return {name: under(Ops(name, ops.conv, scan)) for name, scan in scans.items()}


def check(model: Mamba, ids: Tensor) -> dict[str, float]:
    """Relative error of each implementation, and of each fault, against the readable model in float64.

    Raises:
        RuntimeError: an implementation that does not agree, or a fault that does: then no time means anything.
    """
    twin = Mamba(model.config).double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = twin(ids).logits
        errors = {n: float((f(ids).double() - truth).norm() / truth.norm()) for n, (_, f) in peers(model).items()}
        wrong = {n: float((f(ids).double() - truth).norm() / truth.norm()) for n, f in faults(model).items()}
    bad = [n for n, e in errors.items() if not e < AGREE] + [n for n, e in wrong.items() if not e > 0.1]
    if bad:
        raise RuntimeError(f"the check against float64 fails for {', '.join(bad)}: {errors | wrong}")
    return errors | wrong


def measure(name: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Times of one piece of work: median, least and most seconds of each implementation, and ratios to ours."""
    size, b, l, train = WORK[name]
    d_model, n_layer = SIZES[size]
    model = lively(MambaConfig(d_model, n_layer, vocab_size=512), seed)
    ids = torch.randint(0, 512, (rounds + 1, b, l + 1), generator=torch.Generator().manual_seed(seed))
    agreement = check(model, ids[0, :2, : min(l, 64)])
    left_out = SQUARE if train and l > 64 else set()
    made = {n: peer for n, peer in peers(model).items() if n not in left_out}
    steps = {n: _training(m, f) if train else _forward(f) for n, (m, f) in made.items()}
    times: dict[str, list[float]] = {n: [] for n in steps}
    for r in tqdm(range(rounds + 1), desc=name):
        order = list(steps.items())
        for n, step in order[r % len(order) :] + order[: r % len(order)]:
            begin = time.perf_counter()
            step(ids[r])
            if r:  # the first round warms up
                times[n].append(time.perf_counter() - begin)
    median = {n: statistics.median(t) for n, t in times.items()}
    ours = next(iter(median))
    fastest = min((n for n in median if n != ours), key=median.__getitem__, default=None)
    return {
        "work": name,
        "seconds": {n: {"median": median[n], "min": min(t), "max": max(t)} for n, t in times.items()},
        "ratio_to_ours": {n: median[n] / median[ours] for n in median if n != ours},
        "fastest_peer": fastest,
        "speedup": median[fastest] / median[ours] if fastest else None,
        "error_against_float64": agreement,
        "rounds": rounds,
        "left_out": sorted(left_out),
    }


def _forward(f: Forward) -> Callable[[Tensor], None]:
    def step(ids: Tensor) -> None:
        with torch.no_grad():
            f(ids[:, :-1])

    return step


def _training(module: nn.Module, f: Forward) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(module.train().parameters(), lr=1e-5)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(f(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def table(results: list[dict[str, Any]]) -> str:
    """The results as lines of text: ratio of each peer's median to ours."""
    lines = []
    for r in results:
        lines.append(f"\n{r['work']}  ({r['rounds']} rounds, one thread each)")
        for n, t in r["seconds"].items():
            ratio = r["ratio_to_ours"].get(n, 1.0)
            error = r["error_against_float64"][n]
            lines.append(
                f"  {n:20} {t['median'] * 1e3:9.1f} ms  [{t['min'] * 1e3:.1f} .. {t['max'] * 1e3:.1f}]  "
                f"{ratio:5.2f}x  error {error:.1e}"
            )
        if r["left_out"]:
            lines.append(f"  left out: {', '.join(r['left_out'])} (a backward that costs O(l^2), minutes a step)")
    return "\n".join(lines)


def markdown(results: list[dict[str, Any]]) -> str:
    """The README's table: how many times longer than ours each peer takes."""
    peers = list(dict.fromkeys(n for r in results for n in r["ratio_to_ours"]))
    lines = ["| | ours | " + " | ".join(peers) + " |", "|---|---|" + "---|" * len(peers)]
    for r in results:
        ours = r["seconds"]["mambascope torch"]["median"]
        shown = [f"{r['ratio_to_ours'][n]:.1f}x" if n in r["ratio_to_ours"] else "-" for n in peers]
        lines.append(f"| {r['work']} | {ours * 1e3:.0f} ms | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def run(rounds: int, everything: bool, seed: int = 0) -> dict[str, Any]:
    """All the work on one thread, with provenance."""
    torch.set_num_threads(1)
    results = [measure(name, rounds, seed) for name in (WORK if everything else USUAL)]
    return {"results": results, "provenance": provenance(seed=seed, threads=1, dtype="float32")}
