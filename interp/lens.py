"""Lenses: what each layer would answer, and what each part of the model adds to a logit of this run.

The residual stream is a sum, and so is each state; the head is linear in the stream once the last norm's denominator
(and mean) is held at this run's value. So a logit is a sum over the embedding and, of each layer, what is read from its
state, its skip and its bias; and what is read from the state is a sum over positions, channels and state dimensions.
These are direct contributions: what a part does by way of later layers is in their terms.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Edit, Mamba, MambaState, at
from minimal_mamba.address import resolve, selector
from minimal_mamba.block import LayerNorm, RMSNorm, wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import EditError, InputError, of_type

from .positions import local, one_position
from .recurrence import outside, recurrence, recurrence_sites
from .run import Lengths, Run, each, known, run
from .tuned_lens import TunedLens

AXES = {"pos": "l", "e": "e", "n": "n"}


@torch.no_grad()
def logit_lens(
    model: Mamba, ids: Tensor, tokens: Sequence[int] | Tensor | None = None, *,
    pos: int | slice | Sequence[int] = slice(None), log_probs: bool = False, lens: TunedLens | None = None,
    edits: Edit | Iterable[Edit] = (), lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """What the head reads from the residual stream before each layer and after the last.

        lm_head(norm_f(resid_pre_i)), i = 0 .. layers - 1; lm_head(norm_f(resid_post of the last layer))

    Args:
        tokens: (b, m) ids to keep, or (m,), the same for all rows, where m is not b; None: all.
        pos: as in `at`; an int drops the axis.
        log_probs: log p in nats over the vocabulary (padding of the embedding left out), instead of logits.
        lens: of `tuned_lens`, through whose maps each layer's stream is read.
    Returns:
        (layers + 1, b, positions, v or m); the last are the run's logits. NaN at positions that a padded row lacks.
    Raises:
        EditError: an edit of `final_norm` or `logits`, which the lens looks past. InputError: tokens that do not
            exist, or of which it is open whether they are one a row; a lens of a model of other sizes.
    Cost: one forward, and the head layers + 1 times, (b, positions, v) at a time; with `tokens` and without `log_probs`
        no more than those tokens' columns of it.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    edits = each(edits, Edit)
    known(model)
    if lens is not None:
        of_type("lens", lens, TunedLens, "that tuned_lens made")
        sizes = model.config.n_layer, model.config.d_model
        if lens.bias.shape != sizes:
            raise InputError(
                f"lens is of {tuple(lens.bias.shape)}: give what tuned_lens makes for {sizes[0]} layers of d_model "
                f"{sizes[1]}."
            )
    for edit in edits:
        if getattr(edit, "address", None) is not None and edit.address.site in ("final_norm", "logits"):
            raise EditError(f"{edit}: the lens reads the residual stream, before {edit.address.site}. Leave it out.")
    entering, leaving = at.resid_pre(pos=pos), at.resid_post(layer=-1, pos=pos)
    out = run(model, ids, edits, [entering, leaving], backend, state, lengths=lengths, last_only=True)
    stream = torch.cat([out[entering], out[leaving][None]])  # (layers + 1, b, [positions], d)
    chosen = None if tokens is None else _tokens(model, "tokens", tokens, ((-1,), (len(ids), -1)))
    if chosen is not None and chosen.dim() == 1 and 1 < len(chosen) == len(ids):
        b = len(ids)
        raise InputError(
            f"tokens {chosen.tolist()!s:.60} are as many as there are rows: one a row is ({b}, 1), as tokens[:, None]; "
            f"all of them in each row is ({b}, {b}), as tokens.expand({b}, -1)."
        )
    rows = None if chosen is None else chosen.expand(len(ids), -1)  # (b, m)
    few: Tensor | None = None
    if rows is not None and not log_probs and rows.numel() < model.config.padded_vocab:
        few = model.lm_head.weight[rows]  # (b, m, d): no other column is needed
    seen: Tensor | None = None
    for i, resid in enumerate(stream):
        normal = model.backbone.norm_f(resid if lens is None else lens(resid, i))  # (b, [positions], d)
        scores = model.lm_head(normal) if few is None else einsum(normal, few, "b ... d, b m d -> b ... m")
        if log_probs:
            scores = scores[..., : model.config.vocab_size].to(wide(scores.dtype)).log_softmax(-1)
            if rows is not None:
                scores = scores.gather(-1, rows if scores.dim() == 2 else rows[:, None].expand(*scores.shape[:2], -1))
        seen = scores.new_empty((len(stream), *scores.shape)) if seen is None else seen
        seen[i] = scores  # a list to be stacked would take twice the memory
    assert seen is not None
    return seen


@dataclass(frozen=True, eq=False, repr=False)
class DirectLogit(Brief):
    """The parts of one logit, or of a difference of logits, which they sum to.

    Args:
        embed: (b,) of the token's embedding.
        read, skip, bias: (layers, b) of each layer's C h and D u, through gate and out_proj, and of out_proj's bias.
        norm_bias: (b,) of LayerNorm's bias, else 0.
        rest: (b,) the remainder: what edits added beside these parts (as one of resid_post), and rounding.
        logit: (b,) the run's own.
        what: in words what they sum to, "logit" or "logit difference"; of a direction in vocabulary "sum of logits".
    """

    embed: Tensor
    read: Tensor
    skip: Tensor
    bias: Tensor
    norm_bias: Tensor
    rest: Tensor
    logit: Tensor
    what: str = "logit"

    def total(self) -> Tensor:
        """(b,) the sum of all parts: the logit."""
        layers = (self.read + self.skip + self.bias).sum(0)
        return self.embed + layers + self.norm_bias + self.rest


@torch.no_grad()
def direct_logit(
    model: Mamba, ids: Tensor, answer: int | Tensor, foil: int | Tensor | None = None, *, pos: int = -1,
    edits: Edit | Iterable[Edit] = (), lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> DirectLogit:  # fmt: skip
    """Direct logit attribution: take a logit apart into the embedding and each layer's read, skip and bias.

        logit = w (norm.weight / sigma) (embed + sum_layers out_proj(y gate + D u gate) + bias), sigma of this run

    Args:
        answer: a token id, or (b,) of them; or a direction in vocabulary, floating point, (v,) or (b, v).
        foil: a token id, or (b,): the logit difference answer - foil; None: the answer's logit.
        pos: an int, as in `at`: the position whose logits are meant.
    Returns:
        DirectLogit. Contributions to a single logit share what moves all logits alike; differences do not.
    Raises:
        InputError: an answer or foil that does not exist, and what `run` raises.
    Cost: one forward.
    Source: direct logit attribution as in Elhage et al. 2021, "A mathematical framework for transformer circuits", with
        the layernorm held as TransformerLens's `apply_ln_to_stack` holds it.
    """
    return _direct(model, ids, answer, foil, pos, each(edits, Edit), lengths, state, backend, [])[0]


@dataclass(frozen=True, eq=False, repr=False)
class StateLens(Brief):
    """What the states add to a logit, or to a difference of logits.

    Args:
        values: (layers, b, *axes) of what was written in this run; the axes are those of `by`, in the order l, e, n.
        initial: (layers, b, *axes without l) of the memory that the run began with, 0 without one.
        rest: (b,) all that is not read from these layers' states: embedding, skips, biases, other layers, edits.
        logit: (b,) the run's own, the sum of all of these.
        by, layers: as asked, each layer as its number.
        direct: the parts of the same logit by layer; `direct.read` is what `values` and `initial` take apart.
    """

    values: Tensor
    initial: Tensor
    rest: Tensor
    logit: Tensor
    by: tuple[str, ...]
    layers: tuple[int, ...]
    direct: DirectLogit

    def total(self) -> Tensor:
        """(b,) the sum of all parts: the logit."""
        parts = (part.reshape(*part.shape[:2], -1).sum((0, 2)) for part in (self.values, self.initial))
        return sum(parts, self.rest)


@torch.no_grad()
def state_lens(
    model: Mamba, ids: Tensor, answer: int | Tensor, foil: int | Tensor | None = None, *,
    by: Sequence[str] | str = ("n",), layers: int | slice | Sequence[int] = slice(None), pos: int = -1,
    edits: Edit | Iterable[Edit] = (), lengths: Lengths = None, state: MambaState | None = None, backend: str = "auto",
) -> StateLens:  # fmt: skip
    """What each state dimension, channel and position written at adds to a logit, by way of what is read at `pos`.

        w (norm.weight / sigma) out_proj[:, e] gate_t[e] C_t[n] prod_{s < r <= t} decay_r[e, n] write_s[e, n]

    Args:
        answer, foil, pos: as in `direct_logit`.
        by: which of "pos", "e" and "n" to tell apart; what is not named is summed over. Position s counts from this
            run's first token.
        layers: whose states; their axis is kept.
    Returns:
        StateLens. Zero at positions behind `pos`, and on padding.
    Raises:
        EditError: an edit inside the recurrence of one of these layers (edit dt, u, B or C). InputError: `by` names
            something else, and what `direct_logit` raises.
    Cost: one forward that keeps dt and u of these layers, and l steps of (b, e, n) a layer; no more than
        (layers, b, l, e) beside what `by` asks for.
    """
    known(model)
    named = (by,) if isinstance(by, str) else tuple(by)
    if not {*named} <= {*AXES} or len({*named}) < len(named):
        raise InputError(f"by={by!r}: name some of 'pos', 'e' and 'n', each once.")
    chosen = resolve(selector(layers, "layer"), model.config.n_layer, "layer")
    edits = outside(edits, chosen, model.config.n_layer)
    direct, out, weight = _direct(model, ids, answer, foil, pos, edits, lengths, state, backend, chosen)
    kept = " ".join(["b", *(a for a in ("e", "n") if a in named)])
    rows, t = torch.arange(len(ids), device=weight.device), local(out, pos, state)
    values, initial = [], []
    for layer in chosen:
        r = recurrence(model, out, layer, state)
        through = weight @ model.backbone.layers[layer].mixer.out_proj.weight.to(weight.dtype)  # (b, e)
        through = through * out[at.gate(pos=pos)][layer]
        reading = einsum(through, out[at.C(layer=layer, pos=pos)].to(weight.dtype), "b e, b n -> b e n")
        value: Tensor | None = None
        for s, share in r.sources(reading, t):
            part = einsum(share, f"b e n -> {kept}")
            if s is None:
                initial.append(part)
            elif "pos" not in named:
                value = part if value is None else value + part
            else:
                value = part.new_zeros(len(ids), ids.shape[1], *part.shape[1:]) if value is None else value
                value[rows, s.clamp(min=0)] += part  # a row that has no more tokens adds 0
        assert value is not None
        values.append(value)
    rest = direct.logit - direct.read[chosen].sum(0)
    order = tuple(a for a in AXES if a in named)
    return StateLens(torch.stack(values), torch.stack(initial), rest, direct.logit, order, tuple(chosen), direct)


def _direct(
    model: Mamba, ids: Tensor, answer: int | Tensor, foil: int | Tensor | None, pos: int, edits: Iterable[Edit],
    lengths: Lengths, state: MambaState | None, backend: str, layers: Sequence[int],
) -> tuple[DirectLogit, Run, Tensor]:  # fmt: skip
    """The parts of a logit; the run, with the recurrence of `layers`; the logit's direction in the stream, (b, d)."""
    known(model)
    w, pos = wide(model.dtype), one_position(pos)
    target = _direction(model, answer, foil, len(ids))  # (b, v)
    y, skip, gate = at.y(pos=pos), at.skip(pos=pos), at.gate(pos=pos)
    embed, stream, logits = at.embed(pos=pos), at.resid_post(layer=-1, pos=pos), at.logits(pos=pos)
    record = [y, skip, gate, embed, stream]
    record += [site for i in layers for site in (*recurrence_sites(i), at.C(layer=i, pos=pos))]
    last = pos == -1  # then the head reads one position a row
    record += [] if last else [logits]
    out = run(model, ids, edits, record, backend, state, lengths=lengths, last_only=last)
    logit = ((out.logits[:, 0] if last else out[logits]).to(w) * target).sum(-1)

    norm, resid = cast(RMSNorm | LayerNorm, model.backbone.norm_f), out[stream].to(w)  # (b, d)
    head = target @ model.lm_head.weight.to(w)  # (b, d)
    scaled = head * norm.weight.to(w)
    if isinstance(norm, RMSNorm):
        weight = scaled * (resid.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        norm_bias = torch.zeros_like(logit)
    else:
        centred = scaled - scaled.mean(-1, keepdim=True)  # instead of centring each part of the stream
        weight = centred * (resid.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
        norm_bias = head @ norm.bias.to(w)

    read, skipped, bias = [], [], []
    for i, layer in enumerate(model.backbone.layers):
        project = layer.mixer.out_proj
        through = weight @ project.weight.to(w) * out[gate][i]  # (b, e)
        read.append((through * out[y][i]).sum(-1))
        skipped.append((through * out[skip][i]).sum(-1))
        bias.append(torch.zeros_like(logit) if project.bias is None else weight @ project.bias.to(w))
    first, reads, skips, biases = (weight * out[embed].to(w)).sum(-1), *map(torch.stack, (read, skipped, bias))
    rest = logit - first - (reads + skips + biases).sum(0) - norm_bias
    single = "sum of logits" if isinstance(answer, Tensor) and answer.is_floating_point() else "logit"
    what = single if foil is None else "logit difference"
    return DirectLogit(first, reads, skips, biases, norm_bias, rest, logit, what), out, weight


def _direction(model: Mamba, answer: int | Tensor, foil: int | Tensor | None, b: int) -> Tensor:
    """The direction in vocabulary, (b, v), in the model's wide type."""
    v, dtype = model.config.padded_vocab, wide(model.dtype)
    if isinstance(answer, Tensor) and answer.is_floating_point():
        if foil is not None or answer.shape not in ((v,), (b, v)):
            raise InputError(
                f"answer is floating point, {tuple(answer.shape)}: a direction in vocabulary is ({v},) or ({b}, {v}), "
                "and has no foil. Token ids are integers."
            )
        return answer.to(model.device, dtype).expand(b, v)
    made = F.one_hot(_tokens(model, "answer", answer, ((), (b,))).expand(b), v).to(dtype)
    if foil is None:
        return made
    return made - F.one_hot(_tokens(model, "foil", foil, ((), (b,))).expand(b), v).to(dtype)


def _tokens(model: Mamba, what: str, given: object, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Token ids as a tensor of one of these shapes (-1: any size); InputError for what is none."""
    try:
        ids = torch.as_tensor(given, device=model.device)
    except (TypeError, ValueError):
        raise InputError(f"{what}={given!r:.60} is no array of token ids; encode text first.") from None
    fits = any(len(s) == ids.dim() and all(w in (-1, g) for w, g in zip(s, ids.shape, strict=True)) for s in shapes)
    v = model.config.vocab_size
    if not fits or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        wanted = " or ".join(str(s).replace("-1", "m") for s in shapes)
        raise InputError(f"{what} has shape {tuple(ids.shape)} and type {ids.dtype}; give token ids {wanted}.")
    if int(ids.min()) < 0 or int(ids.max()) >= v:
        raise InputError(f"{what}: token ids are 0..{v - 1}; this has {int(ids.min())}..{int(ids.max())}.")
    return ids.long()
