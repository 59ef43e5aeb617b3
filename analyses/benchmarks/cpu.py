"""Work on the CPU, ours beside the peers', in one process and on the same weights.

The weights are such that the scan carries the logits. Rounds are interleaved, so that the machine's drift hits all
alike. Before any time is taken, every implementation is held against the readable model in float64, and so are three
faulty ones, which must not agree. A peer that does not agree (hooks that did not fire, say) is named and not timed; one
of ours that does not, or a fault that does, stops everything.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from interp import logit_diff
from kernels_bridge.lively import lively as lively_
from minimal_mamba import Mamba, MambaConfig

from . import peers as implementations
from .floor import floor
from .peers import KINDS, RESID, STATE, Ours, Peer
from .rounds import rounds, scaling, spread
from .sweeps import Cell

SIZES = {"S": (128, 4, 512), "M": (768, 6, 512), "tiny": (16, 2, 32)}  # name -> (d_model, n_layer, vocab_size)
# Times the readable float32 model's relative error against float64; at least, at most.
AGREE = (3.0, 5e-6, 5e-4)
DIFFER = 0.05  # what a fault must reach
CELLS = 4  # of a sweep, that a peer computes a round

# The backward of a loop that slices (b, l, e, n) position by position costs O(l^2) traffic.
SQUARE = {"HF transformers", "mambapy sequential", "MambaLens", "TransformerLens"}
LABELS = {"forward": "forward", "train": "training step", "states": "all states captured", "decode": "decoding",
          STATE: "state sweep", RESID: "residual sweep"}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One piece of work; `seconds` is about what its rounds may take in each environment."""

    kind: str
    size: str
    batch: int
    length: int
    seconds: float = 30.0
    threads: int = 1  # 0: all
    new: int = 0  # tokens that are decoded

    @property
    def name(self) -> str:
        """As it is shown: "forward S, batch 8, length 64"."""
        shape = f"{self.length} + {self.new} tokens" if self.new else f"batch {self.batch}, length {self.length}"
        return f"{LABELS[self.kind]} {self.size}, {shape}" + ("" if self.threads else ", all threads")

    @property
    def slug(self) -> str:
        """As a file is called."""
        return self.name.replace(", ", " ").replace(" + ", " ").replace(" ", "-").lower()

    def left_out(self) -> dict[str, str]:
        """Peers that would take minutes."""
        if self.kind == "train" and self.length > 64:
            return dict.fromkeys(SQUARE, "its backward costs O(l^2), minutes a step")
        if self.kind == "train" and self.size == "M":
            return dict.fromkeys(SQUARE - {"TransformerLens"}, "its backward costs O(l^2), half a minute a step")
        return {}


PIECES = {
    p.name: p
    for p in (
        Piece("forward", "S", 8, 256, 40),
        Piece("forward", "S", 8, 64, 10),
        Piece("forward", "S", 8, 1024, 60),
        Piece("forward", "M", 8, 256, 60),
        Piece("forward", "M", 8, 64, 30),
        Piece("train", "S", 16, 256, 50),
        Piece("train", "S", 16, 64, 30),
        Piece("train", "M", 16, 64, 60),
        Piece("states", "S", 8, 128, 20),
        Piece(STATE, "S", 16, 64, 45),
        Piece(RESID, "S", 16, 64, 45),
        Piece("decode", "S", 1, 64, 8, new=64),
        Piece("decode", "M", 1, 64, 30, new=64),
        Piece("forward", "S", 8, 256, 20, threads=0),
        Piece("forward", "M", 8, 256, 45, threads=0),
        Piece("train", "S", 16, 256, 30, threads=0),
    )
}
# not timed, at 20 seconds a call and a minute a step of each peer: forward M of length 1024, training M of length 256


def make(size: str, seed: int = 0) -> Mamba:
    """A model of one of the sizes, under whose weights the scan carries the logits."""
    d_model, n_layer, vocab = SIZES[size]
    return lively_(Mamba(MambaConfig(d_model, n_layer, vocab_size=vocab)), seed)


def double(model: Mamba) -> Mamba:
    """The same model in float64."""
    twin = Mamba(model.config).double()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def faults(model: Mamba) -> dict[str, Peer]:
    """Three wrong models, which a check worth its name must refuse: nothing read from the state, no memory, B for C."""
    r, n = model.config.rank, model.config.d_state
    wrong = {name: copy.deepcopy(model) for name in ("scan zeroed", "no recurrence", "B and C swapped")}
    for layer in wrong["scan zeroed"].backbone.layers:
        layer.mixer.x_proj.weight[r + n :] = 0.0
    for layer in wrong["no recurrence"].backbone.layers:
        layer.mixer.A_log.fill_(12.0)  # exp(dt A) = 0
    for layer in wrong["B and C swapped"].backbone.layers:
        layer.mixer.x_proj.weight[r:] = layer.mixer.x_proj.weight[r:].roll(n, 0)
    return {name: Ours(made, "torch") for name, made in wrong.items()}


def off(found: Tensor, truth: Tensor) -> float:
    """Relative error in norm; not a number of another shape."""
    if found.shape != truth.shape:
        return float("inf")
    return float((found.double() - truth.double()).norm() / truth.double().norm())


class Work:
    """A piece of work on one model: what it gives on few tokens, to be checked, and its step, to be timed."""

    def __init__(self, piece: Piece, seed: int = 0):
        self.piece, self.seed = piece, seed
        self.model = make(piece.size, seed)
        self.vocab = self.model.config.vocab_size
        self.rng = torch.Generator().manual_seed(seed)
        self.few = self.draw(2, min(piece.length, 64 if piece.kind == "forward" else 24))

    def draw(self, batch: int, length: int) -> Tensor:
        """(batch, length) token ids."""
        return torch.randint(0, self.vocab, (batch, length), generator=self.rng)

    def metric(self, logits: Tensor) -> Tensor:
        """What a sweep shows, (b,)."""
        return logit_diff(logits, 3, 5)

    def sites(self, model: Mamba, ids: Tensor) -> dict[int, Tensor]:
        """The swept site of every layer, (b, l, ...)."""
        from interp import at, run

        where = getattr(at, self.piece.kind)(layer=slice(None), pos=slice(None))
        return dict(enumerate(run(model, ids, record=where)[where]))

    def result(self, peer: Peer) -> Tensor:
        """What an implementation gives on few tokens."""
        kind, ids = self.piece.kind, self.few
        if kind == "train":
            peer.module.train()
            weight = next(p for p in peer.module.parameters() if p.shape == self.shape and torch.equal(p, self.first))
            (grad,) = torch.autograd.grad(loss(peer, ids), weight)
            peer.module.eval()
            return grad
        with torch.no_grad():
            if kind == "states":
                return torch.stack(peer.states(ids))
            if kind == "decode":
                return peer.forward(peer.decode(ids, 8))  # one token that differs changes all that follows
            if kind in (STATE, RESID):
                donor, clean = self.sites(self.model, self.others), self.sites(self.model, self.few)
                cell = peer.cell(kind, ids, donor, clean)
                return torch.stack([cell(*place) for place in self.places])
            return peer.forward(ids)

    def truth(self) -> tuple[Tensor, Tensor | None]:
        """The readable model's result in float64, and what hooks that do not fire would give."""
        kind, twin = self.piece.kind, double(self.model)
        self.shape, self.first = twin.backbone.embedding.weight.shape, self.model.backbone.embedding.weight.detach()
        l = self.few.shape[1]
        self.others = torch.flip(self.few, (0, 1))
        self.places = [(i, t) for i in range(self.model.config.n_layer) for t in (0, l // 2, l - 1)]
        exact = Ours(twin, "reference")
        if kind in (STATE, RESID):
            with torch.no_grad():
                donor, clean = self.sites(twin, self.others), self.sites(twin, self.few)
                cell = exact.cell(kind, self.few, donor, clean)
                dead = exact.forward(self.few)[:, -1].expand(len(self.places), -1, -1)
                return torch.stack([cell(*place) for place in self.places]), dead
        if kind == "train":
            self.first = self.first.double()
            found = self.result(exact)
            self.first = self.model.backbone.embedding.weight.detach()
            return found, None
        return self.result(exact), None

    @torch.no_grad()
    def check_grid(self, ours: Ours, bound: float) -> None:
        """What is timed of ours is a whole sweep: it must be that of one run a cell."""
        grid = ours.grid(self.piece.kind, self.few, self.others, self.metric)
        shown = torch.stack([self.metric(logits[:, None]) for logits in self.result(ours)])
        if not off(torch.stack([grid[place] for place in self.places]), shown) < bound:
            raise RuntimeError(f"{ours.backend}: the grid is not that of one run a cell")

    def check(self, made: dict[str, Peer]) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        """Errors of the implementations, of the faults, and the peers that are refused, with why.

        Raises:
            RuntimeError: one of ours does not agree, or a fault does: then no time means anything.
        """
        truth, dead = self.truth()
        readable = off(self.result(Ours(self.model, "reference")), truth)  # what float32 costs, whoever computes
        bound = min(max(AGREE[0] * readable, AGREE[1]), AGREE[2])
        errors: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, peer in made.items():
            try:
                errors[name] = off(self.result(peer), truth)
                if dead is not None and isinstance(peer, Ours):
                    self.check_grid(peer, bound)
            except Exception as e:
                if peer.ours:
                    raise
                refused[name] = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                continue
            if not errors[name] < bound and not peer.ours:
                refused[name] = f"does not agree with float64: relative error {errors[name]:.1e}"
        wrong = {name: off(self.result(peer), truth) for name, peer in faults(self.model).items()}
        if dead is not None:
            wrong["no edit"] = off(dead, truth)
        bad = [n for n, e in errors.items() if made[n].ours and not e < bound]
        bad += [n for n, e in wrong.items() if not e > max(DIFFER, 100 * bound)]
        if bad:
            raise RuntimeError(f"the check against float64 fails for {', '.join(bad)}: {errors | wrong}")
        return errors, wrong, refused

    def step(self, peer: Peer) -> tuple[Callable[[Tensor], object], float]:
        """What is timed, given (batch, length + 1) ids, and which part of the work it is."""
        p = self.piece
        if p.kind == "train":
            optimizer = torch.optim.AdamW(peer.module.train().parameters(), lr=1e-5)

            def train(ids: Tensor) -> None:
                optimizer.zero_grad()
                loss(peer, ids).backward()
                optimizer.step()

            return train, 1.0
        if p.kind in (STATE, RESID):
            return self._sweep(peer)
        does: dict[str, Callable[[Tensor], object]] = {
            "forward": lambda ids: peer.forward(ids[:, :-1]),
            "states": lambda ids: peer.states(ids[:, :-1]),
            "decode": lambda ids: peer.decode(ids[:, :-1], p.new),
        }
        return torch.no_grad()(does[p.kind]), 1.0

    def _sweep(self, peer: Peer) -> tuple[Callable[[Tensor], object], float]:
        p, n = self.piece, self.model.config.n_layer
        base, donor_ids = (torch.randint(0, self.vocab, (p.batch, p.length), generator=_rng(9 + i)) for i in range(2))
        if isinstance(peer, Ours):
            ours = peer
            return torch.no_grad()(lambda ids: ours.grid(p.kind, base, donor_ids, self.metric)), 1.0
        if not hasattr(self, "donor"):
            self.donor, self.clean = (self.sites(self.model, ids) for ids in (donor_ids, base))
        cell: Cell = peer.cell(p.kind, base, self.donor, self.clean)
        rng = _rng(1)

        def cells(ids: Tensor) -> None:
            for place in torch.randint(0, n * p.length, (CELLS,), generator=rng).tolist():
                self.metric(cell(*divmod(place, p.length))[:, None])

        return torch.no_grad()(cells), CELLS / (n * p.length)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(peer: Peer, ids: Tensor) -> Tensor:
    """Next-token cross-entropy of (b, l + 1) ids."""
    return F.cross_entropy(peer.forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def measure(piece: Piece, only: tuple[str, ...] = tuple(KINDS), *, seconds: float | None = None) -> dict[str, Any]:
    """The times of one piece of work, after the check; torch's threads are as they are.

    Args:
        only: the peers that are tried.
    Returns:
        "seconds" of each implementation, "ratio" of the fastest peer's median to ours, "floor", errors, controls, and
        who was left out or refused, with why; on all threads also "threads_over_one", `scaling` of ours.
    """
    work, dear = Work(piece), piece.left_out()
    made, left = implementations.peers(work.model, piece.kind, tuple(n for n in only if n not in dear))
    left |= {n: why for n, why in dear.items() if n in only}
    errors, wrong, refused = work.check(made)
    shown = [f"{n} {e:.0e}" for n, e in errors.items()] + [f"({n} {e:.2f})" for n, e in wrong.items()]
    tqdm.write(f"{piece.name}: error against float64 " + ", ".join(shown))
    for n, why in (left | refused).items():
        tqdm.write(f"  not timed: {n}: {why}")
    made = {n: peer for n, peer in made.items() if n not in refused}
    bound = floor(piece.kind, work.model.config, piece.batch, piece.length, piece.new)
    steps = {n: work.step(peer) for n, peer in made.items()}
    ours = {n for n, peer in made.items() if peer.ours}
    limit = piece.seconds if seconds is None else seconds
    ids = partial(work.draw, piece.batch, piece.length + 1)
    times = rounds(steps, ids, limit, piece.name, ours)
    stats = {n: spread(t) for n, t in times.items()}
    fastest = min((n for n in stats if n not in ours), key=lambda n: stats[n]["median"], default=None)
    return {
        "work": piece.name,
        "threads": torch.get_num_threads(),
        "seconds": stats,
        "fastest_peer": fastest,
        "threads_over_one": {}
        if piece.threads
        else scaling({n: steps[n] for n in sorted(ours)}, ids, limit, piece.name),
        "ratio": {n: stats[fastest]["median"] / stats[n]["median"] for n in sorted(ours)} if fastest else {},
        "floor": bound,
        "error_against_float64": errors,
        "controls": wrong,
        "left_out": left,
        "refused": refused,
    }
