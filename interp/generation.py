"""`generate`: on from a prompt or a carried memory, token by token, under the edits of one pass over the result."""

import math
import operator
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from kernels_bridge import resolve
from minimal_mamba import Address, Edit, Mamba, MambaState, Plan
from minimal_mamba.errors import InputError
from minimal_mamba.tap import NO_TAP

from .run import Lengths, Run, each, known, span


class _Choice:
    """Chooses tokens: the likeliest, or draws of which each row has its own, whatever the others' logits are."""

    def __init__(self, vocab: int, temperature: Any, seed: Any, top_k: Any, top_p: Any, device: torch.device):
        if not _is(temperature, Real) or not 0 <= temperature < math.inf:
            raise InputError(f"temperature={temperature!r}: a finite number, 0 (the likeliest token) or more.")
        if not _is(seed, Integral) or not -(2**63) <= seed < 2**64:
            raise InputError(f"seed={seed!r}: an int of 64 bits.")
        if top_k is not None and (not _is(top_k, Integral) or top_k < 1):
            raise InputError(f"top_k={top_k!r}: an int of at least 1, or None for all tokens.")
        if not _is(top_p, Real) or not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p!r}: a share, above 0 and up to 1, which is all tokens.")
        if temperature == 0 and (top_k is not None or top_p < 1):
            raise InputError(
                f"top_k={top_k!r}, top_p={top_p!r} with temperature=0, which takes the likeliest token: give a "
                "temperature to draw with, such as 1.0."
            )
        self.vocab, self.drawn = vocab, temperature > 0
        self.heat = max(float(temperature), torch.finfo(torch.float32).tiny)
        self.top_k = None if top_k is None else min(int(top_k), vocab)
        self.top_p = float(top_p)
        self.rng = torch.Generator(device).manual_seed(int(seed))
        self.lost: list[Tensor] = []

    def __call__(self, logits: Tensor, i: int) -> Tensor:
        """(b, 1): new token i of each row, of logits (b, v)."""
        real = logits[:, : self.vocab]
        if not self.drawn:
            token = real.argmax(-1, keepdim=True)  # (b, 1), of a NaN if there is one
            self.lost.append(real.gather(1, token)[:, 0].isnan())
            return token
        below = real.float() - real.float().amax(-1, keepdim=True)  # of which a tiny temperature makes 0 and -inf
        for lost, what in ((real, "NaN"), (below, "inf, or nothing but -inf,")):
            refuse_nan(lost.isnan().any(1)[None], i, what)
        shares = self.narrowed(below / self.heat).softmax(-1)
        return torch.multinomial(shares, 1, generator=self.rng)

    def narrowed(self, scores: Tensor) -> Tensor:
        """-inf where top_k or top_p rule a token out: scores (b, v)."""
        if self.top_k is not None:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p < 1:
            share, order = scores.softmax(-1).sort(descending=True, stable=True)
            likelier = share.cumsum(-1) - share  # (b, v), in order: what comes before
            scores = scores.masked_fill((likelier >= self.top_p).scatter(1, order, likelier >= self.top_p), -math.inf)
        return scores

    def settle(self) -> None:
        """Raise InputError if a token was chosen of NaN; once, not each token: it waits for the device."""
        if self.lost:
            refuse_nan(torch.stack(self.lost))


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _tokens(stop: int | Iterable[int], vocab: int) -> Tensor:
    """The tokens with which a row ends; InputError for what is none."""
    try:
        given = stop.tolist() if hasattr(stop, "tolist") else stop  # of a tensor without axes an int
        several = [*given] if isinstance(given, Iterable) else [given]
        if any(isinstance(s, bool) for s in several):
            raise TypeError
        found = [operator.index(s) for s in several]
    except TypeError:
        raise InputError(f"stop={stop!r:.60}: a token id, or several; () for none.") from None
    if wrong := [s for s in found if not 0 <= s < vocab]:
        raise InputError(f"stop={wrong[0]} is outside the vocabulary 0..{vocab - 1}: no row would ever end with it.")
    return torch.tensor(found, dtype=torch.long)


def _where(live: Tensor, new: MambaState | None, old: MambaState | None) -> MambaState:
    """The new memory of the rows that are live, the old one of the others."""
    assert new is not None and old is not None
    h, window = (
        tuple(a.where(live[:, None, None], b) for a, b in zip(*pair, strict=True))
        for pair in ((new.ssm_state, old.ssm_state), (new.conv_state, old.conv_state))
    )
    return MambaState(h, window, new.position.where(live.cpu(), old.position))


def refuse_nan(lost: Tensor, first: int = 0, what: str = "NaN") -> None:
    """Raises InputError if the logits that chose one of the new tokens from `first` on hold NaN: lost (tokens, b)."""
    if bool(lost.any()):
        token, row = lost.nonzero()[0].tolist()
        raise InputError(
            f"the logits of row {row} hold {what} where new token {token + first} is chosen, of which no token is the "
            "likeliest: look for where this model or an edit overflows, with run(model, ids, edits, "
            "record=[at.resid_post()])."
        )


@torch.no_grad()
def generate(
    model: Mamba,
    ids: Tensor,
    n_tokens: int,
    edits: Edit | Iterable[Edit] = (),
    record: Address | Iterable[Address] = (),
    backend: str = "auto",
    lengths: Lengths = None,
    last_only: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    state: MambaState | None = None,
    stop: int | Iterable[int] = (),
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Run:
    """Go on from a prompt for `n_tokens` tokens, under the same edits as one pass over the result would have.

    Positions are absolute; negative ones count from the prompt's end, so that -1 is its last token, and an open slice
    goes on through what is generated. The last token generated is not run, so the last position is l + n_tokens - 2.
    To go on from there: generate(model, out.ids[torch.arange(b), out.lengths - 1][:, None], n, state=out.state).

    Args:
        ids: (b, l) prompts, right-padded where `lengths` says so.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn with this temperature and `seed`, by the
            row's place in the batch. Rows of the embedding beyond the vocabulary are never chosen.
        last_only: keep only the logits that chose the new tokens, (b, n, v).
        state: a memory to go on from, such as `Run.state`; positions then count on from where it stood.
        stop: a token, or several, with which a row ends. It is kept as the row's last token and not run; the other rows
            go on as they would without it, but for a `Mean` over the batch, which is over the rows that are left. Edits
            and recordings of a row end with it.
        top_k: draw from the k likeliest tokens only. top_p: then from the fewest likeliest ones that have this share.
    Returns:
        Run with ids (b, l + n), n = n_tokens or what the longest row took; row i holds its prompt, its new tokens right
        behind it, then zeros. logits (b, l + n - 1, v), zero where a row has no token. No gradients.
    Raises:
        what `run` raises; InputError for choices without a meaning, and logits of NaN; NotReached for a row that
        stopped before the only positions of an edit or recording, or before one that is named by number.
    Cost: one forward of the prompt and n - 1 steps, of all rows until the last has stopped.
    Source: `stop`, `top_k`, `top_p` as in transformers' `generate`, in its order: temperature, top_k, top_p.
    """
    if not _is(n_tokens, Integral) or n_tokens < 1:
        raise InputError(f"n_tokens={n_tokens!r}: at least 1, an int.")
    known(model)
    choose = _Choice(model.config.vocab_size, temperature, seed, top_k, top_p, model.device)
    stops = _tokens(stop, model.config.vocab_size).to(model.device)
    ops = resolve(backend, model.device)
    ids, sizes = model.check(ids, lengths, state)
    b, l = ids.shape
    start, end = span(ids, sizes, state)
    plan = Plan(model.config, each(edits, Edit), each(record, Address), start, end + n_tokens - 1, origin=end)
    rows, ends, one = torch.arange(b, device=ids.device), sizes.to(ids.device), torch.ones_like(sizes)
    later = model.settled(ops if ops.begin is None else ops.begin(model, False, True))
    busy = plan.beyond(end)
    out = model.score(ids, sizes, state, True, last_only, plan, ops)
    last = out.logits[:, -1] if last_only else out.logits[rows, ends - 1]
    chosen, steps, stopped = list[Tensor](), list[Tensor](), False
    live, new = torch.ones_like(rows, dtype=torch.bool), torch.full_like(sizes, n_tokens)  # (b,) new tokens of each row
    for i in range(n_tokens):
        if stopped:
            last = last.where(live[:, None], 0)
        token = choose(last, i)  # (b, 1)
        if stopped:
            token = token.where(live[:, None], 0)
        chosen.append(token)
        steps.append(last)
        if len(stops) and bool((now := live & torch.isin(token[:, 0], stops)).any()):
            live, stopped = live & ~now, True
            new[now.cpu()] = i + 1
            plan.end(end + new - 1)
            if not live.any():
                break
        if i < n_tokens - 1:
            tap = plan if i in busy else NO_TAP  # the plan has nothing to do at most tokens
            out_i = model.score(token, one, out.state, True, False, tap, later)
            kept = _where(live, out_i.state, out.state) if stopped else out_i.state
            out, last = type(out)(out.logits, kept), out_i.logits[:, 0]
    choose.settle()
    n = len(chosen)
    whole = torch.cat([ids * (torch.arange(l, device=ids.device) < ends[:, None]), ids.new_zeros(b, n)], 1)
    whole.scatter_(1, ends[:, None] + torch.arange(n, device=ids.device), torch.cat(chosen, 1))
    if last_only:
        logits = torch.stack(steps, 1)
    else:
        logits = torch.cat([out.logits, out.logits.new_zeros(b, n - 1, out.logits.shape[-1])], 1)
        for i, step in enumerate(steps):
            logits[rows, ends - 1 + i] = step
    size, at = sizes + new, new - 1 if last_only else sizes + new - 2
    return Run(whole, logits, size, out.state, ops.name, model.config.vocab_size, plan.results(), at)
