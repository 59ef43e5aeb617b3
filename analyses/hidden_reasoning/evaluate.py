"""How often the model's final answer is right, on fresh hidden prompts."""

import torch

from minimal_mamba import Mamba, Ops

from .task import MASKED, MaskedTask, draw

STREAM = 2  # keeps the seeds of evaluation apart from those of training
ROWS = 500  # in one forward


@torch.no_grad()
def accuracy(
    model: Mamba, num_steps: int, n: int, seed: int, ops: Ops | None = None, *, task: MaskedTask = MASKED
) -> float:
    """Share of exact final answers: prompt and reasoning up to the last operation are given, the next token counts.

    Args:
        model: trained on the task. num_steps: steps of every prompt, >= 1. n: number of prompts. seed: >= 0.
        ops: the backend's operations; None: the fastest on the model's device.
    Returns:
        0..1. Raises TaskError for fewer than one step or prompt.
    """
    if ops is None:
        from kernels_bridge import resolve

        ops = resolve("auto", model.device)
    batch = draw(num_steps, n, [STREAM, seed, num_steps], hidden=True, task=task)
    right = 0
    for ids, answers in zip(batch.ids.split(ROWS), batch.answer_ids.split(ROWS), strict=True):
        logits = model(ids[:, :-1], last_only=True, ops=ops).logits[:, 0]
        right += int((logits.argmax(-1).cpu() == answers).sum())
    return right / n
