"""What can be trained: a Mamba from scratch, the first layers of a pretrained one, a transformer of the same size.

All are called the same way and give logits (b, l, v), exact on padded rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kernels_bridge.training import Learner
from minimal_mamba import Mamba, Ops

from ..errors import TrainingError
from ..organism import logits_of
from ..task import Tokenizer
from .loss import loss
from .settings import HEADS, Settings


class TaskLearner(Learner):
    """A model with the study's loss; of a Mamba with a backend's operations.

    Args:
        model: a `Mamba`, or a transformer of transformers. ops: the backend's; a transformer has none.
        kind, weight: of the loss.
    """

    def __init__(self, model: nn.Module, ops: Ops | None, kind: str = "weighted", weight: float = 0.5):
        super().__init__(model, ops)  # type: ignore[arg-type]
        self.kind, self.weight = kind, weight

    def forward(  # type: ignore[override]
        self, ids: Tensor, lengths: Tensor, targets: Tensor, reasoning: Tensor, answer: Tensor
    ) -> dict[str, Tensor]:
        """Loss, and the row's scores of the final answer (b, v)."""
        logits = logits_of(self.model, self.ops)(ids, lengths)
        rows = torch.arange(len(ids), device=logits.device)
        found = loss(logits, targets, reasoning, answer, self.kind, self.weight)
        return {"loss": found, "answer_logits": logits[rows, answer.long().argmax(1)]}

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by its own names, each once; a tied head is the embedding."""
        if isinstance(self.model, Mamba):
            return super().weights()
        return {name: t for name, t in self.model.state_dict().items() if name != "lm_head.weight"}


def build(settings: Settings, tokenizer: Tokenizer) -> nn.Module:
    """The model of a run at its start, with weights drawn from torch's global generator.

    Raises:
        TrainingError: a pretrained model with fewer rows than the tokenizer has words. CheckpointError, ConfigError.
    """
    if settings.architecture == "transformer":
        return _transformer(settings, tokenizer)
    if settings.pretrained is None:
        return Mamba(settings.mamba(tokenizer.vocab_size))
    model = Mamba.from_pretrained(settings.pretrained, n_layer=settings.n_layer, dtype=torch.float32)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise TrainingError(
            f"{settings.pretrained} has {model.config.vocab_size} tokens, and the tokenizer {tokenizer.vocab_size}; "
            "give the tokenizer that belongs to it, with --tokenizer."
        )
    return model


def _transformer(settings: Settings, tokenizer: Tokenizer) -> nn.Module:
    """A GPT-2 of as many layers whose width makes its parameters as many as the Mamba's, as near as heads allow."""
    from transformers import GPT2Config, GPT2LMHeadModel

    wanted = sum(p.numel() for p in Mamba(settings.mamba(tokenizer.vocab_size)).parameters())

    def config(width: int) -> Any:
        return GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=settings.task.tokens(settings.positions), n_embd=width,
            n_layer=settings.n_layer, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip

    def parameters(width: int) -> int:
        c = config(width)
        per_layer = 12 * width**2 + 13 * width
        return int(c.n_layer * per_layer + (c.vocab_size + c.n_positions + 2) * width)

    width = min(range(HEADS, 4 * settings.d_model, HEADS), key=lambda w: abs(parameters(w) - wanted))
    return GPT2LMHeadModel(config(width))
