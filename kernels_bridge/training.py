"""Training on any backend with transformers' `Trainer`, and so with accelerate: mixed precision, gradient accumulation,
checkpoints, several processes or GPUs.

    trainer = MambaTrainer(model, TrainingArguments("runs/mine", bf16=True, ...), train_dataset=data, backend="auto")
    trainer.train(resume_from_checkpoint=...)

started as `python script.py`, or on several devices as `torchrun --nproc-per-node 2 script.py` or `accelerate launch`.
`Mamba.from_pretrained` reads each of its checkpoints, and what `save_model` writes; they are in mamba-ssm's layout, or,
where that has no field for the model, as for a FalconMamba, in HF's, which transformers reads too.
A script of several processes ends with `torch.distributed.destroy_process_group()`: a thread of gloo's that is left
when Python ends aborts it now and then.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from minimal_mamba import Mamba, Ops
from minimal_mamba.block import wide
from minimal_mamba.checkpoint import EMBEDDING, HEAD, HF_EMBEDDING, under, unwrapped
from minimal_mamba.errors import CheckpointError, ConfigError, InputError, nearest
from minimal_mamba.files import write_json

from .backends import resolve

try:
    from transformers import Trainer, TrainingArguments
except ModuleNotFoundError as error:
    why = f"training needs transformers ({error}): pip install 'mambascope[train]'."
    raise ModuleNotFoundError(why, name=error.name) from error

IGNORED = -100  # labels that no loss is taken of, as in torch and transformers


class Learner(nn.Module):
    """A `Mamba` on the operations of a backend, called as transformers calls a language model.

    Args:
        model: whose parameters are trained; nothing is copied.
        ops: the backend's operations.
    """

    accepts_loss_kwargs = True  # `Trainer` gives num_items_in_batch then

    def __init__(self, model: Mamba, ops: Ops):
        super().__init__()
        self.model, self.ops = model, ops

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Logits, and with labels the loss.

            loss = sum over tokens t >= 1 with a label of -log p(label_t | input_0 .. input_{t-1}) / their number

        Args:
            input_ids: (b, l). labels: (b, l), -100 where no loss is taken; shifted in here, as in transformers. None
                is taken of padding, whatever its labels.
            attention_mask: (b, l) 1 on tokens, 0 on padding, which comes last.
            num_items_in_batch: what to divide by; `MambaTrainer` counts over all accumulated and parallel batches, so
                that the gradient does not depend on how the batch is cut. None: the labels of this call.
        Returns:
            logits (b, l, v); loss (), 0 where no token has a label.
        Raises:
            InputError: padding that does not come last, or tensors of other shapes than the ids.
        """
        for name, given in (("labels", labels), ("attention_mask", attention_mask)):
            if given is not None and given.shape != input_ids.shape:
                raise InputError(
                    f"{name} {tuple(given.shape)} for input_ids {tuple(input_ids.shape)}; give one a token."
                )
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise InputError("attention_mask: a row has padding before a token; pad on the right.")
        lengths = None if real is None else real.sum(1)
        logits = self.model(input_ids, lengths=lengths, ops=self.ops).logits  # (b, l, v)
        if labels is None:
            return {"logits": logits}
        scores, following = logits[:, :-1].flatten(0, 1), targets(labels, real).flatten()
        total = F.cross_entropy(scores.to(wide(scores.dtype)), following, ignore_index=IGNORED, reduction="sum")
        count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / torch.as_tensor(count, device=total.device).clamp(min=1), "logits": logits}

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by its own names, each once; a tied head is the embedding."""
        tied = self.model.config.tie_embeddings
        return {name: t for name, t in self.model.state_dict().items() if not (tied and name == HEAD)}

    def load(self, checkpoint: Path) -> None:
        """Take over the weights of one of Trainer's checkpoints.

        Raises:
            CheckpointError: it holds other tensors.
        """
        found = unwrapped(load_file(checkpoint / "model.safetensors"))  # older ones have this module's prefix
        stored = under(EMBEDDING, found)
        shapes, own = ({name: t.shape for name, t in x.items()} for x in (stored, self.weights()))
        if shapes != own:
            differ = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise CheckpointError(
                f"{checkpoint} holds other tensors than this model ({', '.join(differ[:4])}, {len(differ)} in all); "
                "train again with another folder."
            )
        self.model.load_state_dict(stored, strict=False)


def targets(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(b, l - 1) the labels of which a loss is taken, each at the token that it follows; -100 elsewhere."""
    kept = labels if attention_mask is None else labels.masked_fill(~attention_mask.bool(), IGNORED)
    return kept[:, 1:]


COLUMNS = ("input_ids", "labels", "attention_mask")


def pad(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate rows of any lengths, padded on the right.

    Args:
        rows: each "input_ids", ints; "labels", as many, the same ids if absent; "attention_mask", where a row is
            padded already.
    Raises:
        InputError: another key, or not one label and mask a token.
    """
    stack = nn.utils.rnn.pad_sequence
    parts: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    for i, row in enumerate(rows):
        for name in row:
            if name not in COLUMNS:
                raise InputError(f"row {i} has {name!r}.{nearest(name, COLUMNS)} pad takes {', '.join(COLUMNS)}.")
        if "input_ids" not in row:
            raise InputError(f"row {i} has no 'input_ids'.")
        ids = torch.as_tensor(row["input_ids"])
        for name, default in (("input_ids", ids), ("labels", ids), ("attention_mask", torch.ones_like(ids))):
            part = torch.as_tensor(row.get(name, default))
            if part.shape != ids.shape or ids.dim() != 1:
                raise InputError(
                    f"row {i} has {name} of shape {tuple(part.shape)}, and input_ids of {tuple(ids.shape)}; give ints, "
                    "one of each a token."
                )
            parts[name].append(part)
    fill = {"labels": IGNORED}
    batch = {name: stack(part, True, fill.get(name, 0)) for name, part in parts.items()}
    if bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


# what Trainer asks of transformers' own models only; one name, the older and the newer
WITHOUT = ("label_smoothing_factor", "neftune_noise_alpha", "gradient_checkpointing", "activation_checkpointing")


class MambaTrainer(Trainer):
    """transformers' `Trainer` for a `Mamba` on a backend. Beyond it: weight decay that spares A_log, D, biases and
    norms; checkpoints that `Mamba.from_pretrained` reads. `eval_loss` is Trainer's, a mean over batches: where rows
    differ in length it depends on how they are batched.

    Args:
        model: the model, or a `Learner` of it with a loss and operations of its own.
        args: TrainingArguments. Everything else is passed on, such as train_dataset, callbacks.
        backend: "auto", "torch", "compiled", "fused" or "reference", on the device that `args` names; "auto" if None.
    Raises:
        BackendUnavailable: the backend cannot run there.
        InputError: arguments that ask for what a Mamba here does not have; a backend beside a `Learner`.
        ConfigError: a model that no checkpoint layout has the fields for.
    """

    def __init__(self, model: Mamba | Learner, args: TrainingArguments, *, backend: str | None = None, **more: Any):
        for name in WITHOUT:
            if value := getattr(args, name, None):
                raise InputError(f"TrainingArguments({name}={value!r}): MambaTrainer has no such thing.")
        if isinstance(model, Learner) and backend is not None:
            raise InputError(f"backend={backend!r}: a Learner has its operations. Make it with resolve({backend!r}).")
        self.learner = model if isinstance(model, Learner) else Learner(model, resolve(backend or "auto", args.device))
        ops = self.learner.ops  # None for a transformer
        if args.torch_compile and ops is not None and ops.name in ("torch", "compiled"):
            raise InputError(
                "TrainingArguments(torch_compile=True): torch.compile cannot trace the operations of "
                f"backend={ops.name!r}, which are fast without it. Leave it out, or take 'reference'."
            )
        self.config = _config(self.learner.model)
        if "data_collator" not in more:
            more["data_collator"] = pad
        super().__init__(self.learner, args, **more)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices decay; A_log, D, biases and norms do not."""
        spared = ("A_log", "D", "bias")
        names = [name for name, p in model.named_parameters() if p.dim() > 1]
        return [name for name in names if name.rsplit(".", 1)[-1] not in spared and "norm" not in name]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's own count would take a row's first token in, which nothing comes before, and labels of padding."""
        counted = []
        for batch in batch_samples:
            if "labels" in batch:
                kept = targets(batch["labels"], batch.get("attention_mask"))
                batch = {**batch, "labels": F.pad(kept, (1, 0), value=IGNORED)}
            counted.append(batch)
        return super()._get_num_items_in_batch(counted, device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        weights = self.learner.weights()
        if self.config is not None and "model_type" in self.config:  # transformers reads it, and draws what it misses
            weights = under(HF_EMBEDDING, weights)
        super()._save(output_dir, weights)
        if self.config is not None and self.args.should_save:
            write_json(Path(output_dir or str(self.args.output_dir)) / "config.json", self.config)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.learner.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.learner.load(Path(str(self.state.best_model_checkpoint)))


def _config(model: nn.Module) -> dict[str, Any] | None:
    """What `config.json` says of a Mamba; None for another module."""
    if not isinstance(model, Mamba):
        return None
    try:
        return model.config.to_mamba_ssm()
    except ConfigError:
        return model.config.to_hf()
