"""State lens: when what is read now was written, and in which state dimension it is kept.

h is a sum over what every token wrote, each faded by the decays since; the head is linear in what is read, once the
last norm's denominator is held. So a logit difference is a sum over positions, channels and state dimensions, exact to
rounding. One forward, and one backward pass over the positions a layer; nothing of size (l, l). The same algebra as
hidden attention (Ali et al. 2024, arXiv:2403.01590), carried on to the logit. Proof: tests/interp/test_lens.py, where
each part is what goes when the model runs without that write.

Here: what speaks for the right answer against that of a prompt with another second operation, in the layer that adds
most.
"""

from pathlib import Path

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import pairs
from interp import state_lens, state_map

from ._save import save

STEPS, ROWS, WHICH = 5, 300, 1


def figure(folder: Path) -> list[Path]:
    """Draw what each position and state dimension adds to the logit difference."""
    model, _ = load_organism("shallow")
    drawn = pairs(STEPS, ROWS, [7, 1], which_step=WHICH)
    lens = state_lens(model, drawn.base_ids, drawn.base_answer, drawn.donor_answer, by=("pos", "n"))
    layer = int(lens.direct.read.mean(1).abs().argmax())
    ops = [f"op{i + 1}" + ("*" if i == WHICH else "") for i in range(STEPS)]
    words = ["hide", *ops, "\\n", "0", *(w for op in ops for w in (op, "[_]"))][: lens.values.shape[2]]
    return save(state_map(lens, layer=layer, tokens=words).figure, folder, "state_lens")
