"""Implementations as the check sees them; ours through taps. `theirs` has other people's, through hooks."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_mamba import Address, Edit, Mamba, MambaConfig, MambaState, Ops, Plan, Set, at
from minimal_mamba.address import address_of
from minimal_mamba.block import Memory, wide
from minimal_mamba.item import Probe
from minimal_mamba.sites import SITES
from minimal_mamba.tap import Tap

Key = tuple[str, int | None]  # a site, or another quantity's name, and its layer
Seen = dict[Key, Tensor]
ORDER = list(SITES)  # the forward's order
WHOLE = [s for s in ORDER if not SITES[s].per_position]  # sites that are one tensor (b, l, ...)
EACH = [s for s in ORDER if SITES[s].per_position]  # those of the two recurrences


class Implementation:
    """One implementation of a model: what it computes, watched.

    `feed` gives layers the reference's residual stream as their input, so that each layer's own error shows.
    """

    name: str
    config: MambaConfig
    module: nn.Module

    def forward(
        self, ids: Tensor, *, lengths: Sequence[int] | None = None, feed: Mapping[int, Tensor] | None = None,
        edits: Sequence[Edit] = (), inside: bool = True, at_positions: Sequence[int] = (),
        each: Sequence[str] = EACH, keep: bool = True, memory: MambaState | None = None,
    ) -> Seen:  # fmt: skip
        """The values of sites, (b, l, ...).

        With `inside` those of the mixers too; at some positions those of `each`; with `keep` the states after the last
        token. A fused block runs where it can give all of that. From a `memory`, what that is afterwards as well, as
        "carried": a forward changes nothing that it is given.
        """
        raise NotImplementedError

    def gradients(
        self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None, each: Sequence[str] = (),
        memory: MambaState | None = None,
    ) -> Seen:  # fmt: skip
        """The loss, its gradient by every parameter that takes one, and by the embedding's output ("d embed"), as in
        training; with `each`, of a model that is not in training, also by these sites at every position.
        """
        raise NotImplementedError

    def mixers(
        self, inputs: Mapping[int, Tensor], memory: MambaState | None = None, lengths: Sequence[int] | None = None
    ) -> Seen:
        """Each layer's mixer by itself, on its input (b, l, d): what it gives, and the gradient of a drawn sum of that
        by the input and by every parameter.

        With a memory, from it: the states after the last token, which take part in the sum, and gradients by those
        before the first. With lengths, of the last token of each row alone (b, 1, d), all else being of no use.
        """
        raise NotImplementedError

    def last(self, inputs: Mapping[int, Tensor], lengths: Sequence[int], keep: bool) -> Seen:
        """`mixers` of the last token of each row without gradients; with `keep` the states after it, too."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Seen:
        """The logits (b, l, v) of feeding the tokens one by one, and the states after the last."""
        raise NotImplementedError


def of_layers(site: str, seen: Seen, dtype: torch.dtype | None = None) -> dict[int, Tensor]:
    """The values of a site by layer, rounded to a type if one is given."""
    return {i: value.to(dtype or value.dtype) for (name, i), value in seen.items() if name == site and i is not None}


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32 or wider, the first token coming after the last one: so that the
    gradient of every position is seen, as that of a metric at the last one needs.
    """
    return F.cross_entropy(logits.to(wide(logits.dtype)).flatten(0, 1), ids.roll(-1, 1).flatten())


class Ours(Implementation):
    """A `Mamba` on the operations of one backend."""

    def __init__(self, model: Mamba, ops: Ops, name: str | None = None):
        self.model, self.ops, self.name, self.config = model, ops, name or ops.name, model.config
        self.module = model

    def forward(  # type: ignore[no-untyped-def]
        self, ids, *, lengths=None, feed=None, edits=(), inside=True, at_positions=(), each=EACH, keep=True, memory=None
    ) -> Seen:
        state = None if memory is None else self._own(memory)
        layers = range(self.config.n_layer)
        fed = [Set(at.resid_pre(layer=i), value) for i, value in (feed or {}).items()]
        sites = WHOLE if inside else ["resid_post", "logits"]
        places: dict[Key, Address] = {}
        for site in sites:
            for i in layers if SITES[site].layered else [None]:
                places[site, i] = address_of(site, i)
        if len(at_positions):
            for i in layers:
                for site in each:
                    places[site, i] = address_of(site, i, pos=list(at_positions))
        plan = Plan(self.config, [*fed, *edits], places.values(), *_span(ids, lengths))
        with torch.no_grad():
            out = self.model(ids, state=state, lengths=lengths, keep_state=keep, tap=plan, ops=self.ops)
        found = plan.results()
        seen = {}
        for key, address in places.items():  # NaN on padding, where nothing is compared; any other NaN is a fault
            has = plan.present(address).to(found[address].device)
            seen[key] = torch.where(has.reshape(*has.shape, *[1] * (found[address].dim() - 2)), found[address], 0.0)
        for i in layers if keep else ():
            seen["last ssm_state", i] = out.state.ssm_state[i]
            seen["last conv_state", i] = out.state.conv_state[i]
        return seen | ({} if state is None else _carried(state))

    def _own(self, memory: MambaState) -> MambaState:
        """A copy of a memory, in the model's types, so that nobody else sees what becomes of it."""
        like = self.model.initial_state(len(memory.position))
        h, window = (
            tuple(x.to(y, copy=True) for x, y in zip(given, blank, strict=True))
            for given, blank in ((memory.ssm_state, like.ssm_state), (memory.conv_state, like.conv_state))
        )
        return MambaState(h, window, memory.position.clone())

    def gradients(
        self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None, each: Sequence[str] = (),
        memory: MambaState | None = None,
    ) -> Seen:  # fmt: skip
        where, state = _span(ids, lengths), None if memory is None else self._own(memory)
        places = {(f"d {site}", i): address_of(site, i) for site in each for i in range(self.config.n_layer)}
        shapes = Plan(self.config, (), places.values(), *where)
        zeros = [leaf(torch.zeros(shapes.shape(a), device=ids.device), wide(self.model.dtype)) for a in places.values()]
        probes = [Probe(a, zero) for a, zero in zip(places.values(), zeros, strict=True)]
        plan = Plan(self.config, [*edits, *probes], (), *where)
        with training(self.model, not each), embedded(self.model.backbone.embedding) as held:
            logits = self.model(ids, state=state, lengths=lengths, tap=plan, ops=self.ops).logits
        plan.results()
        leaves: Seen = {("d embed", None): held[0]}
        leaves |= zip(places, zeros, strict=True)
        return collect(loss_of(logits, ids), dict(self.model.named_parameters()), leaves)

    def mixers(
        self, inputs: Mapping[int, Tensor], memory: MambaState | None = None, lengths: Sequence[int] | None = None
    ) -> Seen:
        seen: Seen = {}
        blank = memory is None
        with training(self.model):
            ops = self._begun(blank, not blank)
            for i, x in inputs.items():
                mixer = self.model.backbone.layers[i].mixer
                given = {"mixer_in": leaf(x, mixer.D.dtype)}
                start = self.model.initial_state(len(x))
                h, window = start.ssm_state[i], start.conv_state[i]
                if memory is not None:
                    h, window = leaf(memory.ssm_state[i], h.dtype), leaf(memory.conv_state[i], window.dtype)
                    given |= {"first ssm_state": h, "first conv_state": window}
                if lengths is None:
                    out, (h, window) = mixer(given["mixer_in"], (h, window), None, Tap(), ops)
                else:
                    out, (h, window) = self._last(mixer, given["mixer_in"], (h, window), lengths, ops)
                found = {"mixer_out": out} | ({} if blank else {"last ssm_state": h, "last conv_state": window})
                seen |= alone(i, mixer, found, given)
        return seen

    @torch.no_grad()
    def last(self, inputs: Mapping[int, Tensor], lengths: Sequence[int], keep: bool) -> Seen:
        seen, ops = Seen(), self._begun(True, keep)
        for i, x in inputs.items():
            mixer, start = self.model.backbone.layers[i].mixer, self.model.initial_state(len(x))
            memory = start.ssm_state[i], start.conv_state[i]
            seen["mixer_out", i], (h, window) = self._last(mixer, x.to(mixer.D.dtype), memory, lengths, ops)
            if keep:
                seen["last ssm_state", i], seen["last conv_state", i] = h, window
        return seen

    def _last(
        self, mixer: nn.Module, x: Tensor, memory: Memory, lengths: Sequence[int], ops: Ops
    ) -> tuple[Tensor, Memory]:
        ends = torch.tensor(list(lengths))
        out, memory = mixer(x, memory, self.model.mask(ends, x.shape[1]), _Last(), ops)
        if out.shape[1] == x.shape[1]:  # line by line all are given
            out = out[torch.arange(len(x), device=x.device), ends.to(x.device) - 1][:, None]
        return out, memory

    def _begun(self, fresh: bool, keep: bool) -> Ops:
        return self.ops if self.ops.begin is None else self.ops.begin(self.model, fresh, keep)

    def decode(self, ids: Tensor) -> Seen:
        return self.pieces(ids, [1] * ids.shape[1], settled=True)

    @torch.no_grad()
    def pieces(self, ids: Tensor, sizes: Sequence[int], settled: bool = False) -> Seen:
        """The logits (b, l, v) of feeding so many tokens at a time, and the states after the last; with what is made of
        the weights once, as `generate` does, if `settled`. "carried" is what the last of several was given, afterwards.
        """
        state, before, logits = None, None, []
        later = self.model.settled(self._begun(False, True)) if settled else self.ops
        for piece in ids.split(list(sizes), 1):
            before = state
            out = self.model(piece, state=before, keep_state=True, ops=self.ops if before is None else later)
            state = out.state
            logits.append(out.logits)
        assert state is not None
        seen: Seen = {("logits", None): torch.cat(logits, 1)}
        for i in range(self.config.n_layer):
            seen["last ssm_state", i], seen["last conv_state", i] = state.ssm_state[i], state.conv_state[i]
        return seen | ({} if before is None else _carried(before))


class _Last(Tap):
    last_only = True


def _carried(state: MambaState) -> Seen:
    return {
        (f"carried {site}", i): x
        for site, part in (("ssm_state", state.ssm_state), ("conv_state", state.conv_state))
        for i, x in enumerate(part)
    }


@contextlib.contextmanager
def training(module: nn.Module, on: bool = True) -> Iterator[None]:
    """In training mode, in which transformers takes its fused path, and `compiled` the gradients of a whole mixer; or,
    if not `on`, out of it."""
    was = module.training
    module.train(on)
    try:
        yield
    finally:
        module.train(was)


@contextlib.contextmanager
def updated(*modules: nn.Module) -> Iterator[None]:
    """With every weight halved in its place, as an optimiser changes them; afterwards they are as they were."""
    weights = list({id(p): p for module in modules for p in module.parameters()}.values())
    held = [p.detach().clone() for p in weights]
    try:
        with torch.no_grad():
            for p in weights:
                p.mul_(0.5)
        yield
    finally:
        with torch.no_grad():
            for p, was in zip(weights, held, strict=True):
                p.copy_(was)


@contextlib.contextmanager
def embedded(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """The embedding's output of the call inside, by which a gradient is asked for."""
    held: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not out.requires_grad:  # its weight is frozen
            out = out.detach().requires_grad_()
        held.append(out)
        return out

    handle = embedding.register_forward_hook(keep)
    try:
        yield held
    finally:
        handle.remove()


def _span(ids: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """(b,) each row's first position, and one past its last."""
    b, l = ids.shape
    return torch.zeros(b, dtype=torch.long), torch.full((b,), l) if lengths is None else torch.tensor(list(lengths))


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy by which a gradient can be asked for."""
    return x.detach().to(dtype).clone().requires_grad_()


def alone(layer: int, mixer: nn.Module, found: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Seen:
    """`pulled` of what a mixer gave, by its inputs and its parameters."""
    by = dict(given) | {f"mixer.{name}": p for name, p in mixer.named_parameters() if p.requires_grad}
    return {(name, layer): value for name, value in pulled(found, by, seed=layer).items()}


def pulled(found: Mapping[str, Tensor], by: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """What was found, first of all something (b, l, ...), and as "d ..." the gradients of a sum of it all whose weights
    every type has exactly.

    They are the smaller the more tokens there are: float16 ends at 65504.
    """
    rng, first = torch.Generator().manual_seed(seed), next(iter(found.values()))
    loss = torch.zeros((), dtype=torch.float64, device=first.device)
    scale = 2.0 ** -(first.shape[:2].numel().bit_length() // 2)
    for value in found.values():
        weights = scale * torch.randn(value.shape, generator=rng).bfloat16().double().to(value.device)
        loss = loss + (value.double() * weights).sum()
    grads = torch.autograd.grad(loss, [*by.values()], materialize_grads=True)
    return {name: value.detach() for name, value in found.items()} | {
        f"d {name}": grad for name, grad in zip(by, grads, strict=True)
    }


def collect(loss: Tensor, parameters: Mapping[str, Tensor], leaves: Mapping[Key, Tensor]) -> Seen:
    """The loss, and its gradients by the parameters that take one and by the leaves."""
    names = [name for name, p in parameters.items() if p.requires_grad]
    by = [*(parameters[name] for name in names), *leaves.values()]
    found = torch.autograd.grad(loss, by, materialize_grads=True)
    seen: Seen = {("loss", None): loss.detach()}
    for name, grad in zip(names, found, strict=False):
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("backbone.layers.") else None
        seen[f"d {name}" if layer is None else f"d {'.'.join(parts[3:])}", layer] = grad
    return seen | dict(zip(leaves, found[len(names) :], strict=True))
