"""Other people's implementations as the check sees them: through hooks on their submodules."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minimal_mamba import Edit, Mamba, MambaState
from minimal_mamba.block import wide
from minimal_mamba.errors import CheckpointError, InputError

from .watch import EACH, Implementation, Seen, alone, collect, embedded, leaf, loss_of, training

# modules of transformers' mixer; before 5.15 it calls a function, which no hook sees
FALCON_NORMS = {"dt_low": "dt_layernorm", "B": "b_layernorm", "C": "c_layernorm"}


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
        out = self.module(ids, **more)
        if not hasattr(out, "logits"):
            raise InputError(
                f"{self.name} returned a {type(out).__name__} without .logits; it returns an output as transformers "
                "and mamba-ssm do, with return_dict=True where it has the choice."
            )
        return out

    def forward(  # type: ignore[no-untyped-def]
        self, ids, *, lengths=None, feed=None, edits=(), inside=True, at_positions=(), each=EACH, keep=True, memory=None
    ) -> Seen:
        if edits or memory is not None:
            raise InputError(f"{self.name} takes no edits, and starts from no memory.")
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
        if cache is None:
            raise InputError(f"{self.name} returned no cache under use_cache=True, in which its states are.")
        if not self.hf:
            for i, (window, h) in cache.key_value_memory_dict.items():
                found["last conv_state", i], found["last ssm_state", i] = window, h
            return found
        for i in range(self.config.n_layer):
            found["last ssm_state", i], found["last conv_state", i] = _hf_states(cache, i)
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
                seen["u", i] = u
                if self.config.mixer_rms_eps is None:
                    parts = out.reshape(b, -1, out.shape[-1]).split([rank, n, n], -1)
                    seen["dt_low", i], seen["B", i], seen["C", i] = parts

            def leave_norm(module: nn.Module, args: tuple[Any, ...], out: Tensor, *, site: str) -> None:
                seen[site, i] = out

            def enter_out(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                seen["gated", i] = args[0]

            def leave_mixer(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                seen["mixer_out", i] = _first(out)

            on(mixer, enter_mixer, leave_mixer)
            on(mixer.in_proj, after=split_in)
            on(mixer.x_proj, after=split_x)
            if self.config.mixer_rms_eps is not None:
                for site, name in FALCON_NORMS.items():
                    if isinstance(norm := getattr(mixer, name, None), nn.Module):
                        on(norm, after=partial(leave_norm, site=site))
            on(mixer.out_proj, after=enter_out)

        try:
            for i, layer in enumerate(self.layers):
                watch(i, layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(
        self, ids: Tensor, edits: Sequence[Edit] = (), lengths: Sequence[int] | None = None, each: Sequence[str] = (),
        memory: MambaState | None = None,
    ) -> Seen:  # fmt: skip
        if edits or lengths or each or memory is not None:
            raise InputError(
                f"{self.name} takes no edits, and no lengths, sites or memory where gradients are asked for."
            )
        with training(self.module), embedded(self.embedding) as held:
            logits = self._call(ids).logits
        named = {k.replace("embeddings.", "embedding."): p for k, p in self.module.named_parameters()}
        return collect(loss_of(logits, ids), named, {("d embed", None): held[0]})

    def mixers(
        self, inputs: Mapping[int, Tensor], memory: MambaState | None = None, lengths: Sequence[int] | None = None
    ) -> Seen:
        if memory is not None or lengths is not None:
            raise InputError(f"{self.name} takes no memory from which a mixer starts, and no lengths there.")
        seen: Seen = {}
        with training(self.module):
            for i, x in inputs.items():
                mixer: Any = self.layers[i].mixer
                given = leaf(x, mixer.out_proj.weight.dtype)
                seen |= alone(i, mixer, {"mixer_out": _first(mixer(given))}, {"mixer_in": given})
        return seen

    def decode(self, ids: Tensor) -> Seen:
        with torch.no_grad():
            return self._decode_hf(ids) if self.hf else self._decode_mamba_ssm(ids)

    def _decode_hf(self, ids: Tensor) -> Seen:
        cache: dict[str, Any] = {}
        logits = []
        for t in range(ids.shape[1]):
            out = self._call(ids[:, t : t + 1], use_cache=True, **cache)
            cache = hf_cache(out)
            logits.append(out.logits)
        return {("logits", None): torch.cat(logits, 1), **self._cached(*cache.values())}

    def _decode_mamba_ssm(self, ids: Tensor) -> Seen:
        params, logits = _cache(ids), []
        for t in range(ids.shape[1]):
            logits.append(self._call(ids[:, t : t + 1], inference_params=params).logits)
            params.seqlen_offset += 1
        return {("logits", None): torch.cat(logits, 1), **self._cached(params)}


def _hf_states(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's SSM and conv state, which transformers has kept in three ways since 5.5."""
    if hasattr(cache, "get_recurrent_state"):  # 5.21 on, for Python 3.11 on
        return cache.get_recurrent_state(layer, state_idx=0), cache.get_conv_state(layer, state_idx=0)
    h, window = cache.layers[layer].recurrent_states, cache.layers[layer].conv_states
    return (h[0], window[0]) if isinstance(h, dict) else (h, window)


def hf_cache(out: Any) -> dict[str, Any]:
    """The cache in what an HF Mamba gave, by the name under which it takes it again: `cache` from 5.24 on."""
    # 5.24 has the old name too, and warns where it is used
    name = "cache" if getattr(out, "cache", None) is not None else "cache_params"
    return {name: getattr(out, name, None)}


def _first(out: Any) -> Tensor:
    """What a mixer gives, of a fork's that gives more beside it."""
    value: Tensor = out[0] if isinstance(out, tuple) else out
    return value


def _cache(ids: Tensor) -> Any:
    from mamba_ssm.utils.generation import InferenceParams

    return InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
