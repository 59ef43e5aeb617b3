"""What transformers' `Trainer` costs beside a bare loop, on the model that ships."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analyses.hidden_reasoning.training.learners import TaskLearner, build
from analyses.hidden_reasoning.training.settings import Settings
from analyses.hidden_reasoning.training.train import draw_batch, train
from kernels_bridge import resolve
from minimal_mamba.provenance import provenance

SETTINGS = Settings(start_length=8, max_length=8, save_every=10**6, log_every=10**6)
WARM, STEPS = 5, 45


def bare(settings: Settings) -> None:
    """The same batches, model, loss, clipping and optimiser, without anything around them."""
    torch.manual_seed(settings.seed)
    learner, curriculum = (
        TaskLearner(build(settings, settings.task.tokenizer), resolve("torch"), settings.loss, settings.answer_weight),
        settings.curriculum(),
    )
    optimizer = torch.optim.AdamW(learner.parameters(), lr=settings.learning_rate, fused=True)
    for step in range(settings.steps):
        batch = draw_batch(settings, step, curriculum)
        optimizer.zero_grad()
        learner(batch.ids, batch.lengths, batch.targets, batch.reasoning, batch.answer)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
        optimizer.step()


def trained(settings: Settings) -> None:
    """The study's own training, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        train(settings, Path(folder) / "run", quiet=True)


def seconds_a_step(loop: Callable[[Settings], None]) -> float:
    """Time of the last STEPS steps of a run: a long one less a short one, so that start and end do not count."""
    times = []
    for steps in (WARM, WARM + STEPS):
        begin = time.perf_counter()
        loop(dataclasses.replace(SETTINGS, steps=steps, warmup_steps=0, decay_steps=0, early=1))
        times.append(time.perf_counter() - begin)
    return (times[1] - times[0]) / STEPS


def run(rounds: int) -> dict[str, Any]:
    """Seconds a step of both, in turn, one thread: medians over the rounds."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"bare loop": [], "Trainer": []}
    for _ in range(rounds):
        times["bare loop"].append(seconds_a_step(bare))
        times["Trainer"].append(seconds_a_step(trained))
    median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    share = median["Trainer"] / median["bare loop"] - 1
    return {"seconds_a_step": times, "median": median, "overhead": share, "provenance": provenance(threads=1)}
