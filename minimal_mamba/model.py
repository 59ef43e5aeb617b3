"""Mamba: the language model, its memory, and its one forward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .block import Layer, Memory, make_norm, wide
from .brief import Brief
from .config import MambaConfig
from .errors import InputError
from .scan import READABLE, Ops
from .tap import NO_TAP, Tap


@dataclass(frozen=True, eq=False, repr=False)
class MambaState(Brief):
    """All that a Mamba remembers. A value: a forward never changes the one it is given.

    Args:
        ssm_state: (b, e, n) a layer, float32 or wider.
        conv_state: (b, e, k) a layer, in the weights' type: the last k conv inputs, newest last.
        position: (b,) int64, the tokens that each row has seen.
    """

    ssm_state: tuple[Tensor, ...]
    conv_state: tuple[Tensor, ...]
    position: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class MambaOutput(Brief):
    """`logits` (b, l, v), or (b, 1, v) with `last_only`; `state` if it was to be kept."""

    logits: Tensor
    state: MambaState | None


class Backbone(nn.Module):
    """Embedding, layers and last norm, named as in `state-spaces/*` checkpoints."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab, config.d_model)
        # a ModuleList, which for a type checker forgets what it holds
        self.layers = cast(Sequence[Layer], nn.ModuleList(Layer(config) for _ in range(config.n_layer)))
        self.norm_f = make_norm(config)


class Mamba(nn.Module):
    """A Mamba-1 language model whose every inner quantity can be read and edited.

    Args:
        config: sizes and choices. Weights are drawn as mamba-ssm draws them, from torch's global generator.
    Source: mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel @ e9594ce. Differs: sites, a carried state as a value,
        exact padding; from dt to the gate everything is float32 or wider also where the weights have 16 bits, and so is
        a carried state.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab, bias=False)
        self._init_weights()
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Source: mamba_ssm.models.mixer_seq_simple._init_weights @ e9594ce."""
        nn.init.normal_(self.backbone.embedding.weight, std=self.config.initializer_range)
        for layer in self.backbone.layers:
            for linear in (layer.mixer.in_proj, layer.mixer.out_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            if self.config.rescale_prenorm_residual:
                layer.mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.backbone.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.embedding.weight.device

    def initial_state(self, batch: int) -> MambaState:
        """The memory before the first token: zeros, of each layer its own."""
        h, window = zip(*(self._blank(batch) for _ in self.backbone.layers), strict=True)
        return MambaState(h, window, torch.zeros(batch, dtype=torch.long))

    def _blank(self, batch: int) -> Memory:
        """A layer's memory before the first token."""
        c, at = self.config, self.device
        h = torch.zeros(batch, c.d_inner, c.d_state, dtype=wide(self.dtype), device=at)
        return h, torch.zeros(batch, c.d_inner, c.d_conv, dtype=self.dtype, device=at)

    def forward(
        self,
        ids: Tensor,
        *,
        state: MambaState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        keep_state: bool = False,
        last_only: bool = False,
        tap: Tap = NO_TAP,
        ops: Ops = READABLE,
    ) -> MambaOutput:
        """Score the next token at every position.

        Args:
            ids: (b, l) token ids below `config.vocab_size`.
            state: the memory to go on from; None starts afresh.
            lengths: (b,) tokens in each row, 1..l; what follows is padding and changes nothing. None: all l.
            keep_state: return the memory after each row's last token.
            last_only: logits of each row's last token only.
            tap: called at every site. ops: the backend's operations. With either, torch.compile does not trace it.
        Returns:
            MambaOutput; logits on padding are zero.
        Raises:
            InputError: ids, lengths or a state that do not fit.
        """
        given = (*self.check(ids, lengths, state), state, keep_state, last_only, tap, ops)
        # in a trace they fail; and there what `is` says of the first call's would hold for the next call's
        if torch.compiler.is_compiling() and not (type(tap) is Tap and ops.name == READABLE.name):
            done: MambaOutput = torch.compiler.disable(self.score)(*given)
            return done
        return self.score(*given)

    def score(
        self, ids: Tensor, sizes: Tensor, state: MambaState | None, keep_state: bool, last_only: bool, tap: Tap,
        ops: Ops,
    ) -> MambaOutput:  # fmt: skip
        """`forward` without its checks, of ids and sizes as `check` gives them: for callers that go token by token."""
        b, l = ids.shape
        mask = self.mask(sizes, l)  # (b, l)
        start = torch.zeros(b, dtype=torch.long) if state is None else state.position
        tap.begin(start, sizes)

        if ops.begin is not None:
            ops = ops.begin(self, state is None, keep_state)
        resid = self.embed(ids, tap)  # (b, l, d)
        if state is None:
            before = [self._blank(b)] * self.config.n_layer  # the same for all: none writes to what it is given
        else:
            before = [*zip(state.ssm_state, state.conv_state, strict=True)]
        normal, after = None, []
        for i, (layer, memory, following) in enumerate(
            zip(self.backbone.layers, before, self._following(), strict=True)
        ):
            resid, normal, memory = layer(resid, memory, mask, tap.at_layer(i), ops, normal, following)
            if keep_state:
                after.append(memory)

        logits = self.head(resid, sizes, mask, last_only, tap, normal)  # (b, l, v)
        if not keep_state:
            return MambaOutput(logits, None)
        h, window = (tuple(x.contiguous() for x in part) for part in zip(*after, strict=True))
        return MambaOutput(logits, MambaState(h, window, start + sizes))

    def settled(self, ops: Ops) -> Ops:
        """The operations for forwards between which no weight changes: each mixer's step is made once."""
        if ops.step is None:
            return ops
        made = {layer.mixer: ops.step(layer.mixer) for layer in self.backbone.layers}
        return replace(ops, step=made.__getitem__)

    # the parts of `forward`, for callers that need the layers one by one: embed, then each layer, then head

    def mask(self, sizes: Tensor, l: int) -> Tensor | None:
        """(b, l) True on tokens, False on padding; None where there is no padding."""
        if l == 1:
            return None
        return (torch.arange(l) < sizes[:, None]).to(self.device) if bool((sizes < l).any()) else None

    def _following(self) -> list[nn.Module]:
        """Of each layer the norm that comes after it."""
        return [*(layer.norm for layer in self.backbone.layers), self.backbone.norm_f][1:]

    def embed(self, ids: Tensor, tap: Tap = NO_TAP) -> Tensor:
        """The residual stream before layer 0: ids (b, l) -> (b, l, d)."""
        resid = tap("embed", self.backbone.embedding(ids))
        return resid.to(wide(resid.dtype)) if self.config.residual_in_fp32 else resid

    def head(
        self, resid: Tensor, sizes: Tensor, mask: Tensor | None = None, last_only: bool = False, tap: Tap = NO_TAP,
        normal: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The residual stream after the last layer (b, l, d) -> logits (b, l, v), zero on padding.

        With `last_only` (b, 1, v), of each row's last token. `normal` is the stream's norm, if it is there already.
        """
        last = (torch.arange(len(sizes)), sizes - 1) if last_only else ()
        early = last_only and not tap.touches("final_norm", "logits")
        if early:
            resid = resid[last][:, None]  # (b, 1, d)
            normal = None if normal is None else normal[last][:, None]
        normal = self.backbone.norm_f(resid) if normal is None else normal
        logits: Tensor = tap("logits", self.lm_head(tap("final_norm", normal)))
        if last_only:
            return logits if early else logits[last][:, None]
        return logits if mask is None else logits * mask[:, :, None]

    def check(
        self, ids: Tensor, lengths: Tensor | Sequence[int] | None = None, state: MambaState | None = None, *,
        name: str = "ids", state_name: str = "state",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Copies of the ids, on the model's device, and of each row's length; raises InputError for what cannot run.

        Args:
            name, state_name: what the caller's own caller knows the ids and the state by, for the error.
        """
        ids = _integers(name, ids, "token ids are integers; of what a tokenizer gives, pass the input_ids")
        if ids.dim() != 2 or ids.numel() == 0:
            raise InputError(f"{name} has shape {tuple(ids.shape)}; it is (batch, length) with at least one token.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            rows = self.config.padded_vocab
            raise InputError(
                f"{name}: token id {low if low < 0 else high} is outside the vocabulary 0..{self.config.vocab_size - 1}"
                + (f" (rows up to {rows - 1} are padding)." if low >= 0 and high < rows else ".")
            )
        b, l = ids.shape
        rule = f"give one int of 1..{l} a row, for {b} rows"
        sizes = torch.full((b,), l) if lengths is None else _integers(f"lengths={lengths}", lengths, rule).cpu()
        if sizes.shape == ids.shape:
            raise InputError(
                f"lengths={tuple(sizes.shape)} numbers: {rule}; of a tokenizer's attention_mask its .sum(1), where the "
                "padding is on the right (padding_side='right')."
            )
        if sizes.shape != (b,) or int(sizes.min()) < 1 or int(sizes.max()) > l:
            raise InputError(f"lengths={sizes.tolist()}: {rule}.")
        if self.device.type == "meta":
            raise InputError("the model is on the meta device, where tensors hold no numbers; load its weights first.")
        if state is not None:
            self._check_state(state, b, state_name)
        return ids.to(self.device, copy=True), sizes.clone()

    def _check_state(self, state: MambaState, b: int, name: str) -> None:
        if not isinstance(state, MambaState):
            raise InputError(f"{name} is a {type(state).__name__}; give run_.state, of a run with keep_state=True.")
        c = self.config
        want = {
            "ssm_state": ((b, c.d_inner, c.d_state), wide(self.dtype)),
            "conv_state": ((b, c.d_inner, c.d_conv), self.dtype),
        }
        for part, (shape, dtype) in want.items():
            found = [tuple(s.shape) for s in getattr(state, part)]
            if found != [shape] * c.n_layer:
                raise InputError(
                    f"{name}.{part} has shapes {found[:2]}... in {len(found)} layers; "
                    f"this run has {shape} in {c.n_layer}."
                )
            for i, s in enumerate(getattr(state, part)):
                if (s.dtype, s.device) != (dtype, self.device):
                    raise InputError(
                        f"{name}.{part} of layer {i} is {s.dtype} on {s.device}; this model carries {dtype} on "
                        f"{self.device}. Take the state from a run of this model, or move it with .to(...)."
                    )
        if tuple(state.position.shape) != (b,):
            raise InputError(f"{name}.position has shape {tuple(state.position.shape)}; this run has {b} rows.")
        if int(_integers(f"{name}.position", state.position, "positions are integers").min()) < 0:
            raise InputError(f"{name}.position={state.position.tolist()}: the tokens that a row has seen, 0 or more.")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        n_layer: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> "Mamba":
        """Load a checkpoint of either layout, from a folder or a hub id; see `minimal_mamba.checkpoint.load`."""
        from .checkpoint import load

        return load(path, n_layer=n_layer, dtype=dtype, device=device, revision=revision)

    @classmethod
    def from_module(cls, module: nn.Module, *, n_layer: int | None = None) -> "Mamba":
        """A copy of a live `MambaForCausalLM` (transformers) or `MambaLMHeadModel` (mamba-ssm)."""
        from .checkpoint import from_module

        return from_module(module, n_layer=n_layer)

    def save_pretrained(self, path: str | Path, *, layout: str = "mamba_ssm", **options: Any) -> None:
        """Write a checkpoint folder; see `minimal_mamba.checkpoint.save`, also for what a layout does not keep."""
        from .checkpoint import save

        save(self, path, layout=layout, **options)


def _integers(what: str, given: object, rule: str) -> Tensor:
    """As an int64 tensor; InputError for what is no array of integers."""
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} is no rectangular array of integers ({error}); {rule}.") from None
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        form = "meta, which holds no numbers" if tensor.is_meta else "nested" if tensor.is_nested else "sparse"
        raise InputError(f"{what} is {form}; give a dense tensor, right-padded where rows differ in length; {rule}.")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{what} has type {tensor.dtype}; {rule}.")
    return tensor.long()
