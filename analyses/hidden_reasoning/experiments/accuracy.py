"""How often a model is right, by length, on prompts that it was never trained on, and how sure that is."""

from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp import probe_fit

from ..errors import TaskError
from ..organism import logits_of
from ..task import MASKED, Batch, Task, Tokenizer, compose, draw, held_out
from ..task.layout import HELD_OUT_FROM, rows_of
from ..task.rules import Ints

STREAM = 2  # keeps the seeds of evaluation apart from those of training
ROWS = 500  # in one forward
LISTED = 200_000  # prompts of a length: up to so many are listed, and each is asked once


@dataclass(frozen=True)
class Score:
    """Right answers among prompts.

    Args:
        prompts: how many. right: exact final answers, the text before it given.
        written: rows whose whole reasoning, written by the model alone, is right to the last token; None: not asked.
        seen: whether training may have shown these prompts, which are too few to keep any apart.
        every: whether these are all the prompts that there are to ask: then the share is no estimate.
    """

    prompts: int
    right: int
    written: int | None
    seen: bool
    every: bool = False

    @property
    def share(self) -> float:
        """0..1."""
        return self.right / self.prompts

    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval of the share; where every prompt was asked, the share twice."""
        return (self.share, self.share) if self.every else wilson(self.right, self.prompts)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share; of none asked, 0 and 1."""
    return probe_fit.wilson(right / n, n) if n else (0.0, 1.0)


def fresh(
    num_steps: int, n: int, seed: int, task: Task = MASKED, tokenizer: Tokenizer | None = None, concealed: bool = True
) -> Batch:
    """At most n prompts, drawn from those held out; of a short length, each at most once.

    Raises:
        NoneHeldOut: of so few prompts none is.
    """
    rows_of(num_steps, n)
    if (every := listed(num_steps, task)) is None:
        key = [STREAM, seed, num_steps]
        return draw(num_steps, n, key, concealed=concealed, prompts="held out", task=task, tokenizer=tokenizer)
    if not len(every):
        raise NoneHeldOut(
            f"of the {len(task.operations) ** num_steps} prompts of {num_steps} operations none was held out."
        )
    order = np.random.default_rng([STREAM, seed, num_steps]).permutation(len(every))[:n]
    return compose(every[order], num_steps, concealed=concealed, task=task, tokenizer=tokenizer)


class NoneHeldOut(TaskError):
    """A length of which training may have seen every prompt."""


@cache
def listed(num_steps: int, task: Task) -> Ints | None:
    """(n, s) all prompts that may be asked, held out where a length has any to spare; None where they are too many."""
    k = len(task.operations)
    if k**num_steps > LISTED:
        return None
    every = np.array(list(product(range(k), repeat=num_steps)))
    return every if num_steps < HELD_OUT_FROM else every[held_out(every, np.full(len(every), num_steps))]


@torch.no_grad()
def score(
    model: nn.Module,
    num_steps: int,
    n: int,
    seed: int,
    *,
    task: Task = MASKED,
    tokenizer: Tokenizer | None = None,
    written: bool = False,
    concealed: bool = True,
) -> Score:
    """Ask a model for the final answers of `fresh` prompts.

    Args:
        model: trained on the task, of either kind. num_steps: steps of every prompt, >= 1. n: number of prompts.
        written: also let the model write all that follows the prompt. concealed: of `masked`; False: the text before
            the answer, where it is given, shows every value.
    Raises:
        TaskError: fewer than one step or prompt. NoneHeldOut: no prompt of this length was held out.
    """
    batch = fresh(num_steps, n, seed, task, tokenizer, concealed)
    device = next(model.parameters()).device
    call, right, whole = logits_of(model), 0, 0
    for i in range(0, len(batch.ids), ROWS):
        rows = slice(i, i + ROWS)
        ids, at = batch.ids[rows].to(device), batch.answer_at[rows].to(device)
        lengths = at + 1
        given = ids[:, : int(lengths.max())]
        guess = call(given, lengths)[torch.arange(len(ids)), at].argmax(-1)
        right += int((guess.cpu() == batch.answer_ids[rows]).sum())
        if written and task.name != "direct":
            whole += int(_write(model, ids, int(batch.prompt_length[0])).eq(ids).all(1).sum())
    asked = written and task.name != "direct"
    there = listed(num_steps, task)
    every = there is not None and len(there) == len(batch.ids)
    return Score(len(batch.ids), right, whole if asked else None, num_steps < HELD_OUT_FROM, every)


def _write(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """(b, l): the prompts, and what the model writes after them, the likeliest token each time."""
    from interp import generate
    from minimal_mamba import Mamba

    new = ids.shape[1] - prompt
    if isinstance(model, Mamba):
        return generate(model, ids[:, :prompt], new, last_only=True).ids
    found: Tensor = model.generate(  # type: ignore[operator]
        ids[:, :prompt], attention_mask=torch.ones_like(ids[:, :prompt]), max_new_tokens=new, min_new_tokens=new,
        do_sample=False,
    )  # fmt: skip
    return found


def packed(found: dict[int, Score], seed: int) -> dict[str, Any]:
    """Scores by length, ready for JSON."""
    return {
        "what": "exact final answers, the text before it given; and rows written whole by the model alone",
        "prompts": "of 4 steps or more: held out of training",
        "seed": seed,
        "lengths": {str(s): asdict(x) | {"share": x.share, "interval": x.interval()} for s, x in found.items()},
    }
