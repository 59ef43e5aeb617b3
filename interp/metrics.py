"""Metrics: from logits to one number a row, each with its unit.

Logits are (b, v), or (b, l, v), of which the last position counts; or a `Run`, whose rows' own last tokens count. The
logits of a padded batch are zero at the end of short rows: pass the run, or `run_.last_logits`.

Logits have a column for each row of the embedding, also for those beyond the vocabulary, which name no token and which
`generate` never picks. Of a `Run` they are left out. Of a tensor everything given counts: the padding has its share of
the probability, and can have the highest logit, unless it is cut off, as in `logits[..., :vocab_size]`. `logit_diff` is
the same either way; and `kl` of a tensor and a run knows the padding of both by the run.
"""

import torch
from torch import Tensor

from minimal_mamba.block import wide
from minimal_mamba.errors import InputError

from .logits import GIVEN
from .run import Run

Tokens = int | Tensor  # one id for all rows, or (b,)


def _last(logits: Tensor | Run) -> Tensor:
    if isinstance(logits, Run):
        real = logits.last_logits[:, : logits.vocab_size]
        return real.to(wide(real.dtype))
    if not isinstance(logits, Tensor):
        raise InputError(f"logits is a {type(logits).__name__}; give a Run, or a tensor (b, v) or (b, l, v).")
    if logits.dim() not in (2, 3):
        raise InputError(f"logits have shape {tuple(logits.shape)}; a metric takes (b, v) or (b, l, v).")
    last = logits if logits.dim() == 2 else logits[:, -1]
    _refuse_padding(logits, last)
    return last.to(wide(last.dtype))


def _refuse_padding(logits: Tensor, last: Tensor) -> None:
    """Zeros alone may be meant (an edit of the last norm), and those of a sweep's cell; beside other numbers they are
    padding, also in a metric that is given no zeros and looks at another run's."""
    blank = ~last.any(-1)
    if bool(blank.any()):
        blank = blank & (last.any(-1).any() if logits.dim() == 2 else logits.any(-1).any(-1) | last.any(-1).any())
        given = GIVEN.get()
        if given is not None:
            zero = ~given[:, -1].any(-1)
            blank = blank & ~(zero if len(zero) == len(blank) else zero.any())
    if bool(blank.any()):
        raise InputError(
            f"the logits of row {int(blank.nonzero()[0])} are all zero at the last position, as on padding, "
            "and others are not. Pass the run, which knows where each row ends: logit_diff(run_, ...)."
        )


def _last_beside(logits: Tensor | Run, other: Tensor | Run) -> Tensor:
    """`_last`; of a tensor with the columns of the run beside it, without those that the run knows to be padding."""
    scores = _last(logits)
    if isinstance(logits, Tensor) and isinstance(other, Run) and scores.shape[-1] == other.logits.shape[-1]:
        return scores[:, : other.vocab_size]
    return scores


def _pick(scores: Tensor, tokens: Tokens) -> Tensor:
    b, v = scores.shape
    try:
        index = torch.as_tensor(tokens, device=scores.device)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"tokens={tokens!r:.60} are no token ids; encode text first.") from None
    if index.shape not in ((), (b,)) or index.is_floating_point() or index.dtype == torch.bool:
        kind = "" if index.dtype == torch.long else f" and type {index.dtype}"
        raise InputError(f"tokens have shape {tuple(index.shape)}{kind}; give one id, or one a row ({b},).")
    if int(index.min()) < 0 or int(index.max()) >= v:
        wrong = int(index.min()) if int(index.min()) < 0 else int(index.max())
        raise InputError(f"token id {wrong} is outside the logits' 0..{v - 1}.")
    return scores.gather(1, index.long().expand(b)[:, None])[:, 0]


def logit_diff(logits: Tensor | Run, answer: Tokens, foil: Tokens) -> Tensor:
    """logit(answer) - logit(foil) = log p(answer) - log p(foil), in nats, (b,)."""
    scores = _last(logits)
    return _pick(scores, answer) - _pick(scores, foil)


def log_prob(logits: Tensor | Run, answer: Tokens) -> Tensor:
    """log p(answer), in nats, (b,)."""
    return _pick(_last(logits).log_softmax(-1), answer)


def prob(logits: Tensor | Run, answer: Tokens) -> Tensor:
    """p(answer), 0 to 1, (b,)."""
    return log_prob(logits, answer).exp()


def kl(logits: Tensor | Run, other: Tensor | Run) -> Tensor:
    """KL(p || q) = sum p (log p - log q), p of `logits` and q of `other`, in nats, >= 0, (b,).

    A metric's logits are held against a run by `lambda logits: kl(logits, run_)`: of a tensor with as many columns as
    the run's logits the padding of the vocabulary is left out, too.
    """
    p, q = _last_beside(logits, other).log_softmax(-1), _last_beside(other, logits).log_softmax(-1)
    if p.shape != q.shape:
        raise InputError(
            f"kl compares {tuple(p.shape)} with {tuple(q.shape)}: rows and vocabulary must match. "
            "Of a run the vocabulary's padding is left out, and of a tensor beside it that has the run's columns."
        )
    apart = torch.where(p == -torch.inf, 0.0, p - q)  # 0 log 0 = 0: a token that a mask rules out adds nothing
    return (p.exp() * apart).sum(-1)


def accuracy(logits: Tensor | Run, answer: Tokens) -> Tensor:
    """1 where the answer has the highest logit, else 0, NaN where a logit is NaN, (b,). Not differentiable.

    Of equal ones, of which 16-bit models have many, the first counts: the one that `generate` takes.
    """
    scores = _last(logits)
    best = _pick(scores, answer)
    right = (scores.argmax(-1) == torch.as_tensor(answer, device=best.device)).to(best.dtype)
    return right.masked_fill(scores.isnan().any(-1), torch.nan)
