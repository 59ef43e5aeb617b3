"""Settings of a training run, and the folder that one process at a time trains in."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minimal_mamba import MambaConfig
from minimal_mamba.errors import nearest
from minimal_mamba.files import write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import TrainingError
from ..task import OPERATIONS, HubTokenizer, Task, Tokenizer, check
from .curriculum import Curriculum
from .loss import check_loss

ARCHITECTURES = ("mamba", "transformer")
HEADS = 4  # of a transformer


@dataclass(frozen=True)
class Settings:
    """Everything that a training run depends on; two runs with equal settings are the same run.

    Args:
        task, modulus, operations, start, acts: the task. max_length: longest length trained on.
        tokenizer: a folder or hub id; None: the small one that ships.
        architecture: "mamba", or "transformer", a GPT-2 of as many layers and as many parameters as that Mamba.
        pretrained: a Mamba checkpoint whose first `n_layer` layers are trained on, with its tokenizer unless another
            is named; None: from scratch.
        d_model, n_layer, d_state, d_conv: sizes of the model; of a pretrained one n_layer alone counts. With d_conv=1
            the state is all that remembers.
        positions: of a transformer, the longest length that it can be given; a Mamba has no such bound.
        batch_size, learning_rate, weight_decay, clip: AdamW on batches of rows, gradients clipped at this norm.
        warmup_steps, steps, decay_steps: the learning rate rises, stays, and falls to 0 over the last `decay_steps`.
        early: all lengths this accurate start the decay before its time; 1 never does.
        loss, answer_weight: which one, and of "weighted" the weight of the final answer; see `loss`.
        hidden_share: of `masked`, the share of prompts that conceal their values.
        start_length, lead, solved, memory: see `Curriculum`.
        seed: of the weights and the data. log_every, save_every: steps.
        report_to: where Trainer reports to beside the log: "tensorboard", "wandb", ... or "none".
    Raises:
        TrainingError, TaskError: a value that cannot be trained.
    """

    task_name: str = "masked"
    modulus: int = 5
    operations: tuple[str, ...] = tuple(OPERATIONS)
    start: int = 0
    acts: str = "arithmetic"
    max_length: int = 12
    tokenizer: str | None = None
    architecture: str = "mamba"
    pretrained: str | None = None
    d_model: int = 80
    n_layer: int = 12
    d_state: int = 16
    d_conv: int = 4
    positions: int = 24
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 100
    steps: int = 4_000
    decay_steps: int = 800
    early: float = 0.985
    loss: str = "weighted"
    answer_weight: float = 0.5
    hidden_share: float = 0.85
    start_length: int = 2
    lead: int = 1
    solved: float = 0.9
    memory: int = 256
    seed: int = 0
    log_every: int = 100
    save_every: int = 500
    report_to: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        for name in ("batch_size", "steps", "log_every", "save_every", "d_model", "n_layer", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}={getattr(self, name)}: give at least 1.")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name}={getattr(self, name)}: give a number above 0.")
        for name in ("warmup_steps", "decay_steps", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name}={getattr(self, name)}: give at least 0.")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise TrainingError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"steps={self.steps}; give more steps or shorter ones."
            )
        if not 0 <= self.hidden_share <= 1:
            raise TrainingError(f"hidden_share={self.hidden_share}: give a share from 0 to 1.")
        if self.architecture not in ARCHITECTURES:
            hint = nearest(self.architecture, ARCHITECTURES)
            raise TrainingError(f"architecture={self.architecture!r}:{hint} there are {', '.join(ARCHITECTURES)}.")
        if self.pretrained is not None and self.architecture != "mamba":
            raise TrainingError("pretrained= takes a Mamba; leave it out, or train a Mamba.")
        if self.architecture == "transformer" and self.positions < self.max_length:
            raise TrainingError(
                f"positions={self.positions}: a transformer trained to length {self.max_length} needs as many."
            )
        check_loss(self.loss, self.answer_weight)
        self.task, self.curriculum()

    @property
    def task(self) -> Task:
        """The task that is trained."""
        return Task(self.modulus, self.operations, self.start, self.acts, self.task_name)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises TokenizerError for one that splits or joins the task's words."""
        path = self.tokenizer or self.pretrained
        if path is None:
            return self.task.tokenizer
        found = HubTokenizer(path)
        check(self.task, found)
        return found

    def mamba(self, vocab_size: int) -> MambaConfig:
        """A Mamba of these sizes."""
        return MambaConfig(self.d_model, self.n_layer, vocab_size, d_state=self.d_state, d_conv=self.d_conv)

    @property
    def decay_from(self) -> int:
        """The step from which on the learning rate falls, unless all lengths are solved earlier."""
        return self.steps - self.decay_steps

    def command(self, run: str) -> str:
        """The command line that trains with these settings into the run of a name."""
        usual = Settings()
        given = [
            f"--{name.removesuffix('_name').replace('_', '-')} {_option(getattr(self, name))}"
            for name in OPTIONS
            if getattr(self, name) != getattr(usual, name)
        ]
        return " ".join([f"python -m analyses.hidden_reasoning train --out runs/{run}", *given])

    def with_steps(self, steps: int) -> "Settings":
        """The same with another number of steps, warm-up and decay in proportion."""
        return dataclasses.replace(self, steps=steps, warmup_steps=min(100, steps // 10), decay_steps=steps // 5)

    def curriculum(self) -> Curriculum:
        """A curriculum at its start."""
        return Curriculum(
            self.max_length, start=self.start_length, lead=self.lead, solved=self.solved, memory=self.memory
        )

    def rate(self, step: int, decay_from: int) -> float:
        """Learning rate at a step (from 0), as a share of the highest; it falls from step `decay_from` on."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return rise if step < decay_from else rise * max(0.0, 1 - (step - decay_from + 1) / (self.decay_steps + 1))


# of the command line
OPTIONS = (
    "task_name", "acts", "modulus", "operations", "architecture", "pretrained", "tokenizer", "loss", "answer_weight",
    "seed", "steps", "max_length", "batch_size", "learning_rate", "d_model", "n_layer", "d_conv",
)  # fmt: skip


def _option(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


# What may differ when a run is resumed: how often it is written down, and, until the decay begins, when it ends. A run
# with another number of steps is the same run up to there.
FREE = ("log_every", "save_every", "steps", "decay_steps", "report_to")


def open_run(folder: Path, settings: Settings, *, resume: bool) -> Settings | None:
    """Make the folder of a run, or check that it is the same run that is resumed.

    Returns:
        the settings that the run had, if it is resumed.
    Raises:
        TrainingError: there is a run and it is not to be resumed, there is none to resume, or it had other settings.
    """
    if not resume:
        if (folder / "settings.json").exists():
            raise TrainingError(f"{folder} already holds a run; resume it with --resume, or give another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", dataclasses.asdict(settings))
        return None
    old = read_settings(folder)
    theirs, ours = dataclasses.asdict(old), dataclasses.asdict(settings)
    if differs := [k for k in ours if k not in FREE and theirs[k] != ours[k]]:
        shown = ", ".join(f"{k}={theirs[k]!r} (now {ours[k]!r})" for k in differs)
        raise TrainingError(f"the run in {folder} has {shown}; resume it with its own settings, or start another.")
    return old


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, so that no second process trains in it; a process that dies lets go of it.

    Raises:
        TrainingError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"another process is training in {folder}; wait for it, or stop it first.") from None
        yield


def replace_folder(part: Path, folder: Path) -> None:
    """Move a folder that was written aside to its place, where an older one may be."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_settings(folder: Path) -> Settings:
    """The settings of the run in a folder; raises TrainingError where there is none."""
    path = folder / "settings.json"
    if not path.is_file():
        raise TrainingError(f"{folder} holds no run, so there is nothing to resume; leave --resume out.")
    try:
        return Settings(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError):
        raise TrainingError(f"{path} is not of a run of this version; train again with another --out.") from None
