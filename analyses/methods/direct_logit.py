"""Direct logit attribution: which parts of the model write the answer into the residual stream.

The logits are linear in the residual stream once the last norm's denominator is held at this run's value, and the
stream is a sum: the embedding and, of each layer, what it read from its state, its skip and its bias. One forward.
Elhage et al. 2021, "A mathematical framework for transformer circuits". Proof: tests/interp/test_lens.py, where each
part is what goes when the model runs without it, and nothing is left over.

Direct means direct: a layer that only feeds later layers has no bar of its own.
"""

from pathlib import Path

from analyses.hidden_reasoning import load_organism
from analyses.hidden_reasoning.task import pairs
from interp import direct_logit, parts_bars

from ._save import save


def figure(folder: Path) -> list[Path]:
    """Draw what each part adds to the right answer's logit against another value's."""
    model, _ = load_organism("shallow")
    drawn = pairs(5, 300, [7, 2], which_step=1)
    found = direct_logit(model, drawn.base_ids, drawn.base_answer, drawn.donor_answer)
    return save(parts_bars(found).figure, folder, "direct_logit")
