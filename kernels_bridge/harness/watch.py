"""Implementations as the check sees them: ours through taps, other people's modules through hooks from outside."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_mamba import Address, Edit, Mamba, MambaConfig, MambaState, Ops, Plan, Set, at
from minimal_mamba.block import wide
from minimal_mamba.errors import CheckpointError, InputError
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

    def forward(
        self, ids: Tensor, *, lengths: Sequence[int] | None = None, feed: Mapping[int, Tensor] | None = None,
        edits: Sequence[Edit] = (), inside: bool = True, at_positions: Sequence[int] = (),
        each: Sequence[str] = EACH, keep: bool = True,
    ) -> Seen:  # fmt: skip
        """The values of sites, (b, l, ...).

        With `inside` those of the mixers too; at some positions those of `each`; with `keep` the states after the last
        token. A fused block runs where it can give all of that.
        """
        raise NotImplementedError

    def gradients(self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None) -> Seen:
        """The loss, its gradient by every parameter that takes one, and by the embedding's output ("d embed")."""
        raise NotImplementedError

    def mixers(self, inputs: Mapping[int, Tensor], memory: MambaState | None = None) -> Seen:
        """Each layer's mixer by itself, on its input (b, l, d): what it gives, and the gradient of a drawn sum of that
        by the input and by every parameter.

        With a memory, from it: the states after the last token, which take part in the sum, and gradients by those
        before the first.
        """
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Seen:
        """The logits (b, l, v) of feeding the tokens one by one, and the states after the last."""
        raise NotImplementedError


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32 or wider, the first token coming after the last one: so that the
    gradient of every position is seen, as that of a metric at the last one needs.
    """
    return F.cross_entropy(logits.to(wide(logits.dtype)).flatten(0, 1), ids.roll(-1, 1).flatten())


class Ours(Implementation):
    """A `Mamba` on the operations of one backend."""

    def __init__(self, model: Mamba, ops: Ops, name: str | None = None):
        self.model, self.ops, self.name, self.config = model, ops, name or ops.name, model.config

    def forward(  # type: ignore[no-untyped-def]
        self, ids, *, lengths=None, feed=None, edits=(), inside=True, at_positions=(), each=EACH, keep=True
    ) -> Seen:
        layers = range(self.config.n_layer)
        fed = [Set(at.resid_pre(layer=i), value) for i, value in (feed or {}).items()]
        sites = WHOLE if inside else ["resid_post", "logits"]
        places: dict[Key, Address] = {}
        for site in sites:
            for i in layers if SITES[site].layered else [None]:
                places[site, i] = getattr(at, site)() if i is None else getattr(at, site)(layer=i)
        if len(at_positions):
            for i in layers:
                for site in each:
                    places[site, i] = getattr(at, site)(layer=i, pos=list(at_positions))
        plan = Plan(self.config, [*fed, *edits], places.values(), *_span(ids, lengths))
        with torch.no_grad():
            out = self.model(ids, lengths=lengths, keep_state=keep, tap=plan, ops=self.ops)
        found = plan.results()
        seen = {}
        for key, address in places.items():  # NaN on padding, where nothing is compared; any other NaN is a fault
            has = plan.present(address).to(found[address].device)
            seen[key] = torch.where(has.reshape(*has.shape, *[1] * (found[address].dim() - 2)), found[address], 0.0)
        for i in layers if keep else ():
            seen["last ssm_state", i] = out.state.ssm_state[i]
            seen["last conv_state", i] = out.state.conv_state[i]
        return seen

    def gradients(self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None) -> Seen:
        plan = Plan(self.config, edits, (), *_span(ids, lengths))
        with _embedded(self.model.backbone.embedding) as held:
            logits = self.model(ids, lengths=lengths, tap=plan, ops=self.ops).logits
        plan.results()
        return _collect(loss_of(logits, ids), dict(self.model.named_parameters()), held[0])

    def mixers(self, inputs: Mapping[int, Tensor], memory: MambaState | None = None) -> Seen:
        seen: Seen = {}
        blank = memory is None
        ops = self.ops if self.ops.begin is None else self.ops.begin(self.model, blank, not blank)
        for i, x in inputs.items():
            mixer = self.model.backbone.layers[i].mixer
            given = {"mixer_in": _leaf(x, mixer.D.dtype)}
            start = self.model.initial_state(len(x))
            h, window = start.ssm_state[i], start.conv_state[i]
            if memory is not None:
                h, window = _leaf(memory.ssm_state[i], h.dtype), _leaf(memory.conv_state[i], window.dtype)
                given |= {"first ssm_state": h, "first conv_state": window}
            out, (h, window) = mixer(given["mixer_in"], (h, window), None, Tap(), ops)
            found = {"mixer_out": out} | ({} if blank else {"last ssm_state": h, "last conv_state": window})
            seen |= _alone(i, mixer, found, given)
        return seen

    def decode(self, ids: Tensor) -> Seen:
        return self.pieces(ids, [1] * ids.shape[1])

    def pieces(self, ids: Tensor, sizes: Sequence[int]) -> Seen:
        """The logits (b, l, v) of feeding so many tokens at a time, and the states after the last."""
        state, logits = None, []
        with torch.no_grad():
            for piece in ids.split(list(sizes), 1):
                out = self.model(piece, state=state, keep_state=True, ops=self.ops)
                state = out.state
                logits.append(out.logits)
        assert state is not None
        seen: Seen = {("logits", None): torch.cat(logits, 1)}
        for i in range(self.config.n_layer):
            seen["last ssm_state", i], seen["last conv_state", i] = state.ssm_state[i], state.conv_state[i]
        return seen


class Theirs(Implementation):
    """A live module of transformers' or mamba-ssm's layout, or a fork of one, watched by hooks on its submodules.

    What a fused path computes without calling a submodule cannot be seen from outside and is left out.
    """

    def __init__(self, module: nn.Module, name: str):
        if hasattr(module, "_orig_mod"):
            raise CheckpointError(
                f"{name} comes from torch.compile, inside of which no hook looks. Give the module that was compiled, "
                "its _orig_mod."
            )
        self.module, self.name = module.eval(), name
        try:
            self.backbone = module.backbone
            self.layers: Sequence[nn.Module] = self.backbone.layers  # type: ignore[assignment, union-attr]
            self.embedding: Any = getattr(self.backbone, "embeddings", None) or self.backbone.embedding  # type: ignore[union-attr]
            [(layer.norm, layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.out_proj) for layer in self.layers]  # type: ignore[union-attr]
        except AttributeError as error:
            raise CheckpointError(
                f"{name} is a {type(module).__name__} without the parts of a Mamba language model ({error}); it needs "
                "backbone.layers[i].{norm, mixer.in_proj, mixer.x_proj, mixer.out_proj}, as transformers and mamba-ssm."
            ) from None
        self.config = Mamba.from_module(module).config
        self.hf = hasattr(self.backbone, "embeddings")

    def _call(self, ids: Tensor, lengths: Sequence[int] | None = None, **more: Any) -> Any:
        if lengths is not None:
            if not self.hf:
                raise InputError(f"{self.name} takes no padded batches: mamba-ssm's model has no mask.")
            mask = torch.arange(ids.shape[1]) < torch.tensor(list(lengths))[:, None]
            more["attention_mask"] = mask.long().to(ids.device)
        return self.module(ids, **more)

    def forward(  # type: ignore[no-untyped-def]
        self, ids, *, lengths=None, feed=None, edits=(), inside=True, at_positions=(), each=EACH, keep=True
    ) -> Seen:
        if edits:
            raise InputError(f"{self.name} takes no edits.")
        seen: Seen = {}
        more: dict[str, Any] = {}
        if self.hf:
            more["use_cache"] = True
        elif inside:  # with a cache mamba-ssm takes the path that calls its submodules, and leaves its states
            more["inference_params"] = _cache(ids)
        with torch.no_grad(), self._hooks(seen, feed or {}, inside):
            out = self._call(ids, lengths, **more)
        seen["logits", None] = out.logits
        if lengths is not None:
            mask = (torch.arange(ids.shape[1]) < torch.tensor(list(lengths))[:, None]).to(ids.device)
            for key, value in seen.items():
                seen[key] = value * mask[:, :, None] if value.shape[:2] == mask.shape else value
        if more:
            seen |= self._cached(*hf_cache(out).values() if self.hf else more.values())
        return seen

    def _cached(self, cache: Any) -> Seen:
        found: Seen = {}
        if not self.hf:
            for i, (window, h) in cache.key_value_memory_dict.items():
                found["last conv_state", i], found["last ssm_state", i] = window, h
            return found
        for i in range(self.config.n_layer):
            found["last ssm_state", i] = cache.get_recurrent_state(i, state_idx=0)
            found["last conv_state", i] = cache.get_conv_state(i, state_idx=0)
        return found

    @contextlib.contextmanager
    def _hooks(self, seen: Seen, feed: Mapping[int, Tensor], inside: bool) -> Iterator[None]:
        handles = []
        rank, n = self.config.rank, self.config.d_state

        def on(module: nn.Module, before: Any = None, after: Any = None) -> None:
            if before:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if after:
                handles.append(module.register_forward_hook(after))

        def watch(i: int, layer: nn.Module) -> None:
            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                residual = (args[1] if len(args) > 1 else kwargs.get("residual")) if not self.hf else None
                if i in feed:  # their block adds hidden to residual: all of the stream goes into one of them
                    value = feed[i]
                    kwargs = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "residual")}
                    if self.hf:
                        return (value.to(hidden.dtype if i == 0 else value.dtype), *args[1:]), kwargs
                    rest = args[2:] if len(args) > 2 else ()
                    return (torch.zeros_like(hidden), value.to(wide(hidden.dtype)), *rest), kwargs
                seen["resid_pre", i] = hidden if residual is None else hidden + residual
                return None

            def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                parts = out if isinstance(out, tuple) else (out,)
                seen["resid_post", i] = parts[0] if self.hf or parts[1] is None else parts[0] + parts[1]

            on(layer, enter, leave)
            if not inside:
                return
            mixer: Any = layer.mixer

            def enter_mixer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen["mixer_in", i] = args[0] if args else kwargs["hidden_states"]

            def split_in(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                seen["x", i], seen["z", i] = out.chunk(2, -1)

            def split_x(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                b = seen["mixer_in", i].shape[0]
                u = args[0].reshape(b, -1, args[0].shape[-1])  # mamba-ssm folds the batch into positions
                low, B, C = out.reshape(b, -1, out.shape[-1]).split([rank, n, n], -1)
                seen["u", i], seen["dt_low", i], seen["B", i], seen["C", i] = u, low, B, C

            def enter_out(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                seen["gated", i] = args[0]

            def leave_mixer(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                seen["mixer_out", i] = out

            on(mixer, enter_mixer, leave_mixer)
            on(mixer.in_proj, after=split_in)
            on(mixer.x_proj, after=split_x)
            on(mixer.out_proj, after=enter_out)

        try:
            for i, layer in enumerate(self.layers):
                watch(i, layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None) -> Seen:
        if edits or lengths:
            raise InputError(f"{self.name} takes no edits, and no lengths where gradients are asked for.")
        self.module.train()  # transformers takes its fused path in training only
        try:
            with _embedded(self.embedding) as held:
                logits = self._call(ids).logits
            named = {k.replace("embeddings.", "embedding."): p for k, p in self.module.named_parameters()}
            return _collect(loss_of(logits, ids), named, held[0])
        finally:
            self.module.eval()

    def mixers(self, inputs: Mapping[int, Tensor], memory: MambaState | None = None) -> Seen:
        if memory is not None:
            raise InputError(f"{self.name} takes no memory from which a mixer starts.")
        seen: Seen = {}
        self.module.train()
        try:
            for i, x in inputs.items():
                mixer: Any = self.layers[i].mixer
                given = _leaf(x, mixer.out_proj.weight.dtype)
                seen |= _alone(i, mixer, {"mixer_out": mixer(given)}, {"mixer_in": given})
            return seen
        finally:
            self.module.eval()

    def decode(self, ids: Tensor) -> Seen:
        with torch.no_grad():
            return self._decode_hf(ids) if self.hf else self._decode_mamba_ssm(ids)

    def _decode_hf(self, ids: Tensor) -> Seen:
        cache: dict[str, Any] = {}
        logits = []
        for t in range(ids.shape[1]):
            out = self.module(ids[:, t : t + 1], use_cache=True, **cache)
            cache = hf_cache(out)
            logits.append(out.logits)
        return {("logits", None): torch.cat(logits, 1), **self._cached(*cache.values())}

    def _decode_mamba_ssm(self, ids: Tensor) -> Seen:
        params, logits = _cache(ids), []
        for t in range(ids.shape[1]):
            logits.append(self.module(ids[:, t : t + 1], inference_params=params).logits)
            params.seqlen_offset += 1
        return {("logits", None): torch.cat(logits, 1), **self._cached(params)}


def hf_cache(out: Any) -> dict[str, Any]:
    """The cache in what an HF Mamba gave, by the name under which it takes it again: `cache` from 5.24 on."""
    name = "cache" if "cache" in out else "cache_params"  # 5.24 has the old name too, and warns where it is used
    return {name: out[name]}


def _cache(ids: Tensor) -> Any:
    from mamba_ssm.utils.generation import InferenceParams

    return InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))


@contextlib.contextmanager
def _embedded(embedding: nn.Module) -> Iterator[list[Tensor]]:
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


def _leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).clone().requires_grad_()


def _alone(layer: int, mixer: nn.Module, found: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Seen:
    """What a mixer gave, and the gradients of a sum of it whose weights every type has exactly."""
    rng = torch.Generator().manual_seed(layer)
    loss = torch.zeros((), dtype=torch.float64, device=found["mixer_out"].device)
    for value in found.values():
        weights = torch.randn(value.shape, generator=rng).bfloat16().double().to(value.device)
        loss = loss + (value.double() * weights).sum()
    by = dict(given) | {f"mixer.{name}": p for name, p in mixer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [*by.values()], materialize_grads=True)
    seen: Seen = {(name, layer): value.detach() for name, value in found.items()}
    return seen | {(f"d {name}", layer): grad for name, grad in zip(by, grads, strict=True)}


def _collect(loss: Tensor, parameters: Mapping[str, Tensor], embedded: Tensor) -> Seen:
    names = [name for name, p in parameters.items() if p.requires_grad]
    found = torch.autograd.grad(loss, [*(parameters[name] for name in names), embedded], materialize_grads=True)
    seen: Seen = {("loss", None): loss.detach()}
    for name, grad in zip(names, found[:-1], strict=True):
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("backbone.layers.") else None
        seen[f"d {name}" if layer is None else f"d {'.'.join(parts[3:])}", layer] = grad
    seen["d embed", None] = found[-1]
    return seen
