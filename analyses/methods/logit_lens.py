"""Logit lens: what the model would answer if it stopped after each layer.

The last norm and the head read the residual stream before each layer. One forward, and the head once a layer.
nostalgebraist 2020. Proof: tests/interp/test_lens.py, where the lens at a layer is a model cut there.

Here: on hidden prompts the text shows `_` where the value so far would stand. Is that value in the residual stream, in
the head's own terms? The map shows its probability among the five values; chance is 0.2.
"""

from pathlib import Path

import torch

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import MASKED, draw
from interp import lens_map, logit_lens

from ._save import save

STEPS, ROWS = 5, 300


def figure(folder: Path) -> list[Path]:
    """Draw where the hidden value can be read with the head."""
    model, _ = load_organism("shallow")
    batch = draw(STEPS, ROWS, seed=[7, 0])
    first = STEPS + 2  # the value 0 stands here; the reasoning follows
    scores = logit_lens(
        model, batch.ids[:, :-1], MASKED.value_ids, pos=slice(first, None)
    )  # (layers + 1, b, p, values)
    start = torch.zeros(ROWS, 1, dtype=torch.long)
    now = torch.cat([start, batch.values.repeat_interleave(2, 1)], 1)[:, : scores.shape[2]]  # (b, p) the value so far
    right = scores.softmax(-1).gather(-1, now.expand(len(scores), -1, -1)[..., None])[..., 0]
    words = ["0", *(w for i in range(STEPS) for w in (f"op{i + 1}", "[_]"))][: scores.shape[2]]
    ax = lens_map(right.mean(1), tokens=words, label="p(value so far)", ends=(0, 1))
    ax.set_title("chance 0.2", fontsize=9)
    return save(ax.figure, folder, "logit_lens")
