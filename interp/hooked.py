"""Habit: `run_with_cache` and `run_with_hooks` with the hook names of MambaLens and TransformerLens, on top of edits.

    from interp.hooked import HookedMamba  # was: from mamba_lens import HookedMamba
    model = HookedMamba.from_pretrained("state-spaces/mamba-130m", tokenizer=tokenizer)
    logits, cache = model.run_with_cache(corrupt_tokens)
    patched = model.run_with_hooks(tokens, fwd_hooks=[("blocks.3.hook_h.7", lambda h, hook: cache[hook.name])])

A hook becomes an `Apply`, a cached name a recording; `interp.hook_names` says which site each name is. What differs
from the peers: nothing is registered on the model; a name that does not exist, a predicate that matches nothing and a
hook that does not fire raise; hooks fire on every backend, so `fast_ssm` and `fast_conv` have nothing to switch off;
batches are rows of one length (`run(..., lengths=)` takes padded ones). Gradients: `interp.gradients`, not backward
hooks. Every name and example of MambaLens' README is in `tests/interp/test_hooked.py`, against its forward restated.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Mamba
from minimal_mamba.block import wide
from minimal_mamba.errors import InputError, NotReached, NotRecorded, UnknownSiteError, nearest

from .hook_edits import Compiled, HookFn, HookPoint
from .hook_names import ALIASES, A, all_names, find
from .run import known, run

__all__ = ["Cache", "HookPoint", "HookedMamba"]

Names = str | Callable[[str], bool]
Hooks = Sequence[tuple[Names, HookFn]]
WRITE = "mixer.hook_ssm_write"
GONE = {
    "add_hook": "run_with_hooks(..., fwd_hooks=) or `with model.hooks(fwd_hooks=...):`",
    "add_perma_hook": "`with model.hooks(fwd_hooks=...):`",
    "reset_hooks": "nothing: no hook outlives its run",
    "remove_all_hook_fns": "nothing: no hook outlives its run",
    "generate": "interp.generate(model.model, ids, n_tokens, edits=...)",
}


def _of_module(name: str) -> Callable[..., Any]:
    """The method of `torch.nn.Module` by this name, called on the model; where that returns itself, the facade."""

    def method(self: "HookedMamba", *args: Any, **options: Any) -> Any:
        found = getattr(self.model, name)(*args, **options)
        return self if found is self.model else found

    method.__name__ = name
    method.__doc__ = f"`torch.nn.Module.{name}` of the model, as scripts for the peers call it."
    return method


class Cache(Mapping[str, Tensor]):
    """What `run_with_cache` kept: `cache["blocks.3.hook_h.7"]`, `cache["resid_pre", 3]`, `cache["h.7", -1]`; copies.

    A value answers to each of its names, whichever it was asked for by.
    """

    def __init__(self, values: Mapping[str, Tensor], n_layer: int):
        self._values, self._n_layer = dict(values), n_layer
        self._by_canonical = {_canonical(name): value for name, value in self._values.items()}

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        match key:
            case str():
                name = key
            case (str(what), SupportsIndex() as layer):
                layer = int(layer)
                name = f"blocks.{layer + self._n_layer if layer < 0 else layer}.hook_{what.removeprefix('hook_')}"
            case _:
                raise NotRecorded(f"{key!r:.80} is no key of a cache: a hook's name, or (name, layer), as in ('y', 0).")
        found = next((k for k in (_canonical(name), f"hook_{name}") if k in self._by_canonical), None)
        if found is None:
            hint = nearest(name, self._values)
            raise NotRecorded(f"{key!r} is not in this cache of {len(self)} values.{hint} names_filter chose them.")
        return self._by_canonical[found].clone()

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Cache with keys {list(self)}"


@dataclass
class HookedMamba:
    """A Mamba under the calls and hook names of MambaLens.

    Args:
        model: the model, which no run changes; `to` and its like act on it in place, as of any torch module.
        tokenizer: needed for strings only; Hugging Face's, or one with `encode(text)` and `decode(ids)`.
        backend: as in `run`.
    """

    model: Mamba
    tokenizer: Any = None
    backend: str = "auto"
    _within: list[tuple[Hooks, list[int]]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        known(self.model)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: torch.device | str | None = None, tokenizer: Any = None, **options: Any
    ) -> "HookedMamba":
        """`Mamba.from_pretrained(path, device=, **options)`, wrapped. No tokenizer is loaded unless one is given."""
        return cls(Mamba.from_pretrained(path, device=device, **options), tokenizer)

    to, cuda, cpu, eval, train, requires_grad_, zero_grad, parameters, named_parameters, state_dict = map(
        _of_module,
        ("to", "cuda", "cpu", "eval", "train", "requires_grad_", "zero_grad", "parameters", "named_parameters",
         "state_dict"),
    )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name in GONE:
            raise UnknownSiteError(f"HookedMamba has no {name}: use {GONE[name]}.")
        raise AttributeError(f"HookedMamba has no attribute {name!r}; the model is `.model`, its sizes `.cfg`.")

    @property
    def cfg(self) -> SimpleNamespace:
        """The sizes under MambaLens' names; `vocab_size` counts the embedding's rows, padding included."""
        c = self.model.config
        return SimpleNamespace(
            d_model=c.d_model, n_layers=c.n_layer, vocab_size=c.padded_vocab, d_state=c.d_state, d_conv=c.d_conv,
            d_inner=c.d_inner, dt_rank=c.rank, expand=c.expand, D=c.d_model, E=c.d_inner, N=c.d_state, D_delta=c.rank,
            D_conv=c.d_conv, V=c.padded_vocab, d_vocab=c.padded_vocab, device=self.model.device,
        )  # fmt: skip

    def __call__(self, input: str | Tensor | Sequence[Any], **options: Any) -> Any:
        """`run_with_hooks` without hooks, or under those of `with model.hooks(...)`."""
        return self.run_with_hooks(input, **options)

    forward = __call__

    def run_with_hooks(
        self,
        input: str | Tensor | Sequence[Any],
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        fast_ssm: bool = False,
        fast_conv: bool = False,
        warn_disabled_hooks: bool = True,
    ) -> Any:
        """Run once under hooks.

        Args:
            input: (b, l) or (l,) token ids, or text if there is a tokenizer.
            fwd_hooks: (name, or predicate of names, and fn(value, hook=)), in order. fn returns what replaces the
                value, or None, after which the value stands as fn left it, changed in place or not. Of what a
                predicate matches, hook_A, a parameter, is left out, and mixer.hook_ssm_write where hook_B_bar, which
                makes the same write, is matched too.
            return_type: "logits" (b, l, v); "loss", the mean next-token cross-entropy in nats, or (b, l-1) with
                `loss_per_token`; "both"; or None.
            fast_ssm, fast_conv, warn_disabled_hooks: accepted and without effect; every hook fires on every backend.
        Raises:
            UnknownSiteError, AddressError: a name that this run does not have. NotReached: a predicate that matches
                no name, or a hook that did not fire. EditError: a hook on a parameter, or that returns another shape.
            InputError: hooks that are no list of pairs; ids that the model cannot run.
        Cost: one forward; as `run` under the same edits.
        """
        logits, _ = self._run(input, fwd_hooks, bwd_hooks, [], prepend_bos, return_type, loss_per_token)
        return logits

    def run_with_cache(
        self,
        input: str | Tensor | Sequence[Any],
        *,
        names_filter: Names | Iterable[str] | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        fast_ssm: bool = False,
        fast_conv: bool = False,
        warn_disabled_hooks: bool = True,
    ) -> tuple[Any, Cache]:
        """Run once and keep what the names choose.

        Args:
            names_filter: a name, several, or a predicate; None keeps everything under MambaLens' names, which is
                3 (b, l, e, n) a layer and more. Values are those after hooks, detached.
            device: where to keep them. remove_batch_dim: drop b, which must be 1.
        Returns:
            What `run_with_hooks` returns, and the Cache.
        """
        if incl_bwd:
            raise InputError("incl_bwd: ask interp.gradients(model.model, ids, metric, wrt=[...]) for gradients.")
        ids = self._ids(input, prepend_bos)
        names = self._chosen(names_filter, ids.shape[1])
        out, kept = self._run(ids, fwd_hooks, bwd_hooks, names, None, return_type, loss_per_token)
        if remove_batch_dim:
            if len(ids) != 1:
                raise InputError(f"remove_batch_dim: this batch has {len(ids)} rows, not 1.")
            kept = {k: v if k.endswith(f".{A}") else v[0] for k, v in kept.items()}
        if device is not None:
            kept = {k: v.to(device) for k, v in kept.items()}
        return out, Cache(kept, self.model.config.n_layer)

    @contextmanager
    def hooks(self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator["HookedMamba"]:
        """Every run of this object inside the `with` is under these hooks; none outlives it.

        Raises:
            NotReached: the block ended and nothing had been run in it.
        """
        _no_backward(bwd_hooks)
        entry: tuple[Hooks, list[int]] = (_pairs(fwd_hooks), [0])
        self._within.append(entry)
        try:
            yield self
        finally:
            self._within.pop()
        if not entry[1][0]:
            raise NotReached("no run of this object happened inside `with model.hooks(...)`: no hook fired.")

    def get_all_hook_names(self, input: str | Tensor | Sequence[Any]) -> list[str]:
        """Every hook name of a run on this input, in the order of the forward."""
        return all_names(self.model.config, self._ids(input, None).shape[1])

    def to_tokens(self, input: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor:
        """(b, l) token ids of one text, or of several of one length; the BOS token in front unless told otherwise."""
        texts = [input] if isinstance(input, str) else list(input)
        rows = [self._encode(text) for text in texts]
        if prepend_bos or prepend_bos is None:
            bos = getattr(self._tokenizer(), "bos_token_id", None)
            if bos is None:
                raise InputError("this tokenizer has no BOS token; pass prepend_bos=False.")
            rows = [[bos, *row] for row in rows]
        if len({len(row) for row in rows}) != 1:
            raise InputError(
                f"the texts have {[len(row) for row in rows]} tokens; the facade takes one length. Padded batches: "
                "interp.run(model.model, ids, lengths=...)."
            )
        return torch.tensor(rows, device=self.model.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        ids = self._encode(text)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens, not one.")
        return ids[0]

    def to_str_tokens(self, input: str | Tensor | Sequence[Any], prepend_bos: bool | None = None) -> list[str]:
        """The text of each token of one row, given as its ids or as text."""
        return [self._tokenizer().decode([i]) for i in self._row(input, prepend_bos)]

    def to_string(self, tokens: Tensor | Sequence[Any]) -> str:
        """The text of one row of token ids, (l,) or (1, l)."""
        return str(self._tokenizer().decode(self._row(tokens)))

    # -- from hooks to edits --------------------------------------------------------------------------------------

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer: HookedMamba(model, tokenizer). Or give token ids.")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        plain = {"add_special_tokens": False} if hasattr(tokenizer, "bos_token_id") else {}
        return list(tokenizer.encode(text, **plain))

    def _tokens(self, input: str | Tensor | Sequence[Any], prepend_bos: bool | None) -> Tensor:
        if isinstance(input, str) or (isinstance(input, Sequence) and len(input) and isinstance(input[0], str)):
            return self.to_tokens(input, prepend_bos)
        try:
            return torch.as_tensor(input)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{input!r:.80} is neither text nor a rectangular array of token ids ({error}).") from None

    def _ids(self, input: str | Tensor | Sequence[Any], prepend_bos: bool | None) -> Tensor:
        ids = self._tokens(input, prepend_bos)
        return self.model.check(ids[None] if ids.dim() == 1 else ids)[0]

    def _row(self, input: str | Tensor | Sequence[Any], prepend_bos: bool | None = None) -> list[int]:
        ids = self._tokens(input, prepend_bos)
        if ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
            raise InputError(f"these tokens have shape {tuple(ids.shape)}; give one row of them, tokens[i].")
        return [int(i) for i in ids.flatten()]

    def _chosen(self, chosen: Names | Iterable[str] | None, length: int) -> list[str]:
        names = all_names(self.model.config, length)
        if chosen is None:
            return [n for n in names if ".mixer." not in n]
        if callable(chosen):
            found = [n for n in names if chosen(n)]
            if not found:
                raise NotReached(
                    f"the predicate {chosen!r} matches none of the {len(names)} hook names of this run, such as "
                    f"{names[1]}. Aliases ({', '.join(ALIASES)}) are meant by their exact name only."
                )
            return found
        return [chosen] if isinstance(chosen, str) else list(chosen)

    def _hooked(self, chosen: Names, length: int) -> list[str]:
        """The names that a hook is for; a predicate must not name a parameter, nor one write twice, unasked."""
        names = self._chosen(chosen, length)
        if not callable(chosen):
            return names
        twice = {n for n in names if n.endswith(WRITE) and n.replace(WRITE, "hook_B_bar") in names}
        return [n for n in names if not n.endswith(f".{A}") and n not in twice] or names

    def _run(
        self, input: str | Tensor | Sequence[Any], fwd_hooks: Hooks, bwd_hooks: Hooks, names: Sequence[str],
        prepend_bos: bool | None, return_type: str | None, per_token: bool,
    ) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
        _no_backward(bwd_hooks)
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r}: 'logits', 'loss', 'both' or None.")
        ids = self._ids(input, prepend_bos)
        find_here = partial(find, config=self.model.config, length=ids.shape[1])
        given = [hook for hooks, _ in self._within for hook in hooks] + _pairs(fwd_hooks)
        points = [(find_here(n), fn) for chosen, fn in given for n in self._hooked(chosen, ids.shape[1])]
        for _, count in self._within:  # also of a run that a hook stops
            count[0] += 1
        made = Compiled(self.model, points, ids)
        wanted = [find_here(name) for name in names]
        out = run(self.model, ids, made.edits, made.record(wanted), backend=self.backend, state=made.state)
        kept = {p.name: made.value(p, out.records).detach() for p in wanted}
        if return_type == "logits":
            return out.logits, kept
        if return_type is None:
            return None, kept
        if ids.shape[1] == 1:
            raise InputError(f"return_type={return_type!r}: rows of one token have no next token to be scored.")
        logits = out.logits[:, :-1].to(wide(out.logits.dtype))
        loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none" if per_token else "mean")
        return (loss if return_type == "loss" else (out.logits, loss)), kept


def _canonical(name: str) -> str:
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    return f"{match[1]}.{ALIASES.get(match[2], match[2])}" if match else name


def _pairs(hooks: Hooks) -> list[tuple[Names, HookFn]]:
    """The hooks as a list; InputError for what is no pair of a name or predicate, and a function."""
    given = list(hooks) if isinstance(hooks, Iterable) else [hooks]
    for hook in given:
        pair = hook if isinstance(hook, tuple | list) else ()
        if len(pair) != 2 or not (isinstance(pair[0], str) or callable(pair[0])) or not callable(pair[1]):
            raise InputError(
                f"fwd_hooks holds {hook!r:.80}; give a list of pairs, [(name, fn), ...]: a hook's name or a predicate, "
                "and a function fn(value, hook=)."
            )
    return given


def _no_backward(hooks: Hooks) -> None:
    if hooks:
        raise InputError("bwd_hooks: ask interp.gradients(model.model, ids, metric, wrt=[...]) for gradients.")
