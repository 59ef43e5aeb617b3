"""What hangs on transformers' `Trainer`: the curriculum that goes in and out of checkpoints, and the progress bar."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .settings import Settings


class CurriculumCallback(TrainerCallback, ExportableState):
    """Carries what Trainer does not know of in and out of checkpoints.

    That is the curriculum, the step where an early decay began, the losses since the last row of the log, the seconds.
    """

    def __init__(self, settings: Settings, stop_at: int | None = None):
        self.settings, self.stop_at = settings, stop_at
        self.curriculum = settings.curriculum()
        self.early_from: int | None = None  # step at which all lengths were solved before the decay was due
        self.losses: list[float] = []
        self.seconds, self.clock = 0.0, time.monotonic()

    def tick(self) -> float:
        """Seconds of training so far, over all parts of the run."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return self.seconds

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        kept = {"curriculum": self.curriculum.state(), "early_from": self.early_from}
        return {"args": {}, "attributes": kept | {"losses": self.losses, "seconds": self.tick()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over what the checkpoint kept; at a fresh start that is what is here."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.curriculum.restore(kept["curriculum"])
        self.early_from, self.losses = kept["early_from"], list(kept["losses"])
        self.seconds, self.clock = kept["seconds"], time.monotonic()

    @property
    def decay_from(self) -> int:
        """The step from which on the learning rate falls."""
        return self.settings.decay_from if self.early_from is None else self.early_from

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the decay when all lengths are solved; stop at the end of it."""
        step = state.global_step
        early = self.settings.early < 1 and step < self.decay_from and self.curriculum.done(self.settings.early)
        if early and step >= self.settings.warmup_steps:
            self.early_from = step
        if step == self.stop_at or step >= self.decay_from + self.settings.decay_steps:
            control.should_training_stop = control.should_save = control.should_log = True


class Bars(ProgressCallback):
    """Trainer's progress bar, with the accuracy of each length beside it instead of raw numbers."""

    def __init__(self, progress: CurriculumCallback):
        super().__init__()
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar where the run stands; into a file, a line a minute is enough."""
        wait = 0.5 if sys.stderr.isatty() else 60
        self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, mininterval=wait)
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line a row of the log."""
        if self.training_bar is not None and logs and "loss" in logs:
            head = f"step {state.global_step:6d}  loss {logs['loss']:.4f}  {logs['seconds']:6.0f} s"
            self.training_bar.write(f"{head}  {bars(logs['accuracy'], logs['limit'])}")


def bars(accuracy: list[float], limit: int) -> str:
    """Accuracy of each length as a bar of eight heights, and as a percentage."""
    shown = [f"{i}:{' ▁▂▃▄▅▆▇█'[round(8 * a)]}{100 * a:3.0f}%" for i, a in enumerate(accuracy[:limit], 1)]
    return " ".join(shown)
