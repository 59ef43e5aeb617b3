"""Training on any backend with transformers' `Trainer`, and so with accelerate: mixed precision, gradient accumulation,
checkpoints, several processes or GPUs.

    trainer = MambaTrainer(model, TrainingArguments("runs/mine", bf16=True, ...), train_dataset=data, backend="auto")
    trainer.train(resume_from_checkpoint=...)

started as `python script.py`, or on several devices as `torchrun --nproc-per-node 2 script.py` or `accelerate launch`.
A script of several processes ends with `torch.distributed.destroy_process_group()`: a thread of gloo's that is left
when Python ends aborts it now and then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from minimal_mamba import Mamba, Ops
from minimal_mamba.block import wide
from minimal_mamba.errors import CheckpointError, InputError

from .backends import resolve

IGNORED = -100  # labels that no loss is taken of, as in torch and transformers


class Learner(nn.Module):
    """A `Mamba` on the operations of a backend, called as transformers calls a language model.

    Args:
        model: whose parameters are trained; nothing is copied.
        ops: the backend's operations.
    """

    def __init__(self, model: Mamba, ops: Ops):
        super().__init__()
        self.model, self.ops = model, ops

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> dict[str, Tensor]:
        """Logits, and with labels the loss.

            loss = sum over tokens t >= 1 with a label of -log p(label_t | input_0 .. input_{t-1}) / their number

        Args:
            input_ids: (b, l). labels: (b, l), -100 where no loss is taken; shifted in here, as in transformers.
            attention_mask: (b, l) 1 on tokens, 0 on padding, which comes last.
            num_items_in_batch: what to divide by; `Trainer` counts over all accumulated and parallel batches, so that
                the gradient does not depend on how the batch is cut. None: the labels of this call.
        Raises:
            InputError: padding that does not come last.
        """
        lengths = None if attention_mask is None else attention_mask.sum(1)
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise InputError("attention_mask: a row has padding before a token; pad on the right.")
        logits = self.model(input_ids, lengths=lengths, ops=self.ops).logits  # (b, l, v)
        if labels is None:
            return {"logits": logits}
        scores, following = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = F.cross_entropy(scores.to(wide(scores.dtype)), following, ignore_index=IGNORED, reduction="sum")
        count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count, "logits": logits}

    def weights(self) -> dict[str, Tensor]:
        """Every tensor once; a tied head is the embedding."""
        tied = self.model.config.tie_embeddings
        return {name: t for name, t in self.state_dict().items() if not (tied and name == "model.lm_head.weight")}

    def load(self, checkpoint: Path) -> None:
        """Take over the weights of one of Trainer's checkpoints.

        Raises:
            CheckpointError: it holds other tensors.
        """
        stored = load_file(checkpoint / "model.safetensors")
        if stored.keys() != self.weights().keys():
            raise CheckpointError(f"{checkpoint} holds other tensors than this model; train again with another folder.")
        self.load_state_dict(stored, strict=False)


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate {"input_ids": ints, "labels": ints (the same ids if absent)} of any lengths, padded on the right."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"])) for row in rows]
    stack = nn.utils.rnn.pad_sequence
    batch = {"input_ids": stack(ids, True), "labels": stack(labels, True, IGNORED)}
    if len({len(i) for i in ids}) > 1:
        batch["attention_mask"] = stack([torch.ones_like(i) for i in ids], True)
    return batch


class MambaTrainer(Trainer):
    """transformers' `Trainer` for a `Mamba` on a backend. Beyond it: weight decay that spares A_log, D, biases and
    norms; checkpoints that hold each tied tensor once.

    Args:
        model: the model, or a `Learner` of it with a loss of its own.
        args: TrainingArguments. Everything else is passed on, such as train_dataset, callbacks.
        backend: "auto", "torch", "compiled", "fused" or "reference", on the device that `args` names.
    Raises:
        BackendUnavailable: the backend cannot run there.
    """

    def __init__(self, model: Mamba | Learner, args: TrainingArguments, *, backend: str = "auto", **more: Any):
        self.learner = model if isinstance(model, Learner) else Learner(model, resolve(backend, args.device))
        if "data_collator" not in more:
            more["data_collator"] = pad
        super().__init__(self.learner, args, **more)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; A_log, D, biases and norms do not."""
        spared = ("A_log", "D", "bias")
        names = [name for name, p in model.named_parameters() if p.dim() > 1]
        return [name for name in names if name.rsplit(".", 1)[-1] not in spared and "norm" not in name]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, self.learner.weights())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.learner.load(Path(resume_from_checkpoint))
