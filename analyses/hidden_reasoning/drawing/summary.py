"""The study in one figure."""

from typing import Any

from ..experiments.results import Read
from .maps import account_curves, share_map
from .style import BLUE, PAGE, RED
from .trainings import accuracy_axes, best_bound, depth_curve, score_curve


def summary(new: Any, evaluate_masked: Read, evaluate_transformer: Read, shortcuts_masked_arithmetic: Read,
            curves_all: Read, patch_masked: Read) -> None:  # fmt: skip
    """What it can do, what that takes, where the value is, and what the memory holds."""
    axes = new(2, 2, figsize=(PAGE, 4.4))
    (can, takes), (where, holds) = axes
    score_curve(can, evaluate_masked, "Mamba", BLUE, "o")
    score_curve(can, evaluate_transformer, "transformer", RED, "s")
    best_bound(can, shortcuts_masked_arithmetic["bounds"])
    accuracy_axes(can, "a  answers without a written step", 12)
    can.legend(loc="center", bbox_to_anchor=(0.6, 0.72), handlelength=1.3)
    depth_curve(takes, curves_all)
    takes.set_title("b  solved after 1,500 steps of training")
    words = patch_masked["value: pairs"]["words"]
    image = share_map(where, patch_masked["value: recurrent_state"], words, "c  memory of one layer, or of all, put in")
    where.set(ylabel="layer", xlabel="word after which the donor's memory is put in")
    where.figure.colorbar(image, ax=where, label="answer moved")
    account_curves(holds, patch_masked["handover"], "conv_state", "d  after the conv state of another prompt")
    holds.set_ylabel("answers as foretold")
    holds.legend(loc="center left")
