"""Training on transformers' `Trainer`. A run is a folder; what is in it was written whole, and it can go on from there.

    settings.json       what the run is
    checkpoint-<step>/  Trainer's own: weights, optimiser, and trainer_state.json with the curriculum and the log
    train_log.jsonl     one row every `log_every` steps: step, loss, limit, accuracy by length, seconds

The batch of a step depends on seed, step and curriculum only, and is drawn when it is needed, so a run that was killed
and resumed is the run that was not.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from kernels_bridge import resolve
from kernels_bridge.training import MambaTrainer
from minimal_mamba import Ops
from minimal_mamba.files import write_json, write_text

from ..errors import TrainingError
from ..task import Batch, Tokenizer, WordTokenizer, draw
from .callbacks import Bars, CurriculumCallback
from .learners import TaskLearner, build
from .settings import Settings, only_one, open_run

STREAM = 1  # keeps the seeds of training apart from those of `evaluate`


def train(
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    ops: Ops | None = None,
    device: str = "cpu",
    stop_at: int | None = None,
    quiet: bool = False,
) -> nn.Module:
    """Train a model, or go on training it.

    Args:
        settings: what the run is. out: its folder. resume: go on from its newest checkpoint, if it has one.
        ops: the backend's operations; None: the fastest on this device.
        stop_at: pause after this step, with a checkpoint. quiet: no progress bar.
    Returns:
        the model, in evaluation mode.
    Raises:
        TrainingError: a folder that does not fit, or a loss that is not finite.
    """
    out, tokenizer = Path(out), settings.load_tokenizer()
    if ops is None and settings.architecture == "mamba":
        ops = resolve("auto", device)
    old = open_run(out, settings, resume=resume)
    with only_one(out):
        return _train(settings, tokenizer, old or settings, out, resume, ops, device, stop_at, quiet)


def _train(
    settings: Settings, tokenizer: Tokenizer, old: Settings, out: Path, resume: bool, ops: Ops | None, device: str,
    stop_at: int | None, quiet: bool,
) -> nn.Module:  # fmt: skip
    checkpoint = newest(out) if resume else None
    torch.manual_seed(settings.seed)
    model = build(settings, tokenizer)
    learner = TaskLearner(model, ops, settings.loss, settings.answer_weight)
    if checkpoint is not None and _done(checkpoint, old, settings):
        learner.load(checkpoint)
        return model.eval()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        try:
            trainer = _Trainer(learner, settings, tokenizer, out, device, stop_at, quiet)
        except ValueError as error:  # of the arguments that are Trainer's own, such as where to report to
            raise TrainingError(str(error)) from None
        write_json(out / "settings.json", dataclasses.asdict(settings))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval()


def newest(out: Path) -> Path | None:
    """The last checkpoint of a run."""
    found = {int(p.name.split("-")[1]): p for p in out.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    return found[max(found)] if found else None


def _done(checkpoint: Path, old: Settings, new: Settings) -> bool:
    """Whether the run had come to its end; Trainer would take one more step to find out.

    Raises TrainingError where the number of steps is not that of before, and it is too late for that.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    early = state["stateful_callbacks"][CurriculumCallback.__name__]["attributes"]["early_from"]
    step = state["global_step"]
    if (old.steps, old.decay_steps) != (new.steps, new.decay_steps) and step > min(
        old.decay_from if early is None else early, new.decay_from
    ):
        raise TrainingError(
            f"the run is at step {step}, and its learning rate falls from step "
            f"{old.decay_from if early is None else early} on; its number of steps can be changed before that only, "
            f"to more than {step + new.decay_steps}."
        )
    return bool(step >= (new.decay_from if early is None else early) + new.decay_steps)


class _Batches(IterableDataset[dict[str, Tensor]]):
    """Ready-made batches, from the step and the curriculum as they are when the batch is asked for."""

    def __init__(self, trainer: "_Trainer"):
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            t = self.trainer
            yield vars(draw_batch(t.settings, t.state.global_step, t.progress.curriculum, t.words))


def draw_batch(settings: Settings, step: int, curriculum: Any, tokenizer: Tokenizer | None = None) -> Batch:
    """The batch of a step, of prompts that are not held out."""
    rng = np.random.default_rng([STREAM, settings.seed, step])
    lengths = curriculum.draw(rng, settings.batch_size)
    concealed = rng.random(settings.batch_size) < settings.hidden_share
    own = None if isinstance(tokenizer, WordTokenizer) else tokenizer
    seed = [STREAM, settings.seed, step, 1]
    return draw(
        lengths, settings.batch_size, seed, concealed=concealed, prompts="train", task=settings.task, tokenizer=own
    )


class _Trainer(MambaTrainer):
    def __init__(
        self, learner: TaskLearner, settings: Settings, tokenizer: Tokenizer, out: Path, device: str,
        stop_at: int | None, quiet: bool,
    ):  # fmt: skip
        self.settings, self.words, self.out, self.run_dir = settings, tokenizer, out, out
        self.progress = CurriculumCallback(settings, stop_at)
        args = TrainingArguments(
            output_dir=str(out),
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            optim="adamw_torch_fused",
            logging_steps=settings.log_every,
            save_steps=settings.save_every,
            logging_nan_inf_filter=False,
            per_device_train_batch_size=settings.batch_size,
            use_cpu=device == "cpu",
            report_to=settings.report_to,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ignore_data_skip=True,  # the batches know their step
            disable_tqdm=True,
            seed=settings.seed,
        )
        super().__init__(learner, args, train_dataset=_Batches(self), callbacks=[self.progress])
        self.pop_callback(transformers.PrinterCallback)
        if not quiet:
            self.add_callback(Bars(self.progress))

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Without accelerate's prefetch, which would draw each batch a step too early."""
        return DataLoader(_Batches(self), batch_size=None)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Warm up, stay, decay, with the beginning of the decay read from the run."""
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(chosen, lambda step: self.settings.rate(step, self.progress.decay_from))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; the answers of rows that conceal their values go to the curriculum."""
        found = model(*(inputs[k] for k in ("ids", "lengths", "targets", "reasoning", "answer")))
        loss = found["loss"].item()
        if not math.isfinite(loss):
            step = self.state.global_step
            raise TrainingError(f"the loss is {loss} at step {step}; train again with a lower learning rate.")
        self.progress.losses.append(loss)
        right = found["answer_logits"].detach().argmax(-1) == inputs["targets"][inputs["answer"]]
        counts = inputs["concealed"]
        self.progress.curriculum.update(inputs["num_steps"][counts].cpu(), right[counts].cpu())
        return (found["loss"], found) if return_outputs else found["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the curriculum to a row of the log, and write the log."""
        if "loss" in logs:
            losses, self.progress.losses = self.progress.losses, []
            logs["loss"] = sum(losses) / len(losses)  # Trainer's own mean forgets what was before a resume
            logs |= {**self.progress.curriculum.state(), "seconds": round(self.progress.tick(), 1)}
        super().log(logs, start_time)
        rows = [{k: v for k, v in row.items() if k != "epoch"} for row in self.state.log_history if "loss" in row]
        write_text(self.out / "train_log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside and move it into place, so that a folder with its name is whole."""
        name, aside = f"checkpoint-{self.state.global_step}", self.out / "part"
        shutil.rmtree(aside, ignore_errors=True)
        self.run_dir = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.run_dir = self.out
        for old in self.out.glob("checkpoint-*"):
            if old.name == name:
                shutil.rmtree(old)
        os.replace(aside / name, self.out / name)
        for old in self.out.glob("checkpoint-*"):
            if old.name != name:
                shutil.rmtree(old)
        shutil.rmtree(aside)
