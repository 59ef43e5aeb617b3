"""The table of the scores, and why a method does not find what it does not find."""

from typing import Any

from minimal_mamba.provenance import provenance

from .battery import METHODS
from .models import MODELS
from .scores import REPORT, Table, score_all

# By nature, not by fault: of each cell below 1 the reason. A test sees that no such cell is without one, and none idle.
REASONS: dict[str, str] = {
    "saturated": "the door is shut in the base run, and softplus is flat there: a gradient sees no door to open",
    "product": "B and u of a token are both 0 in the base run, and what is written is their product, of slope 0",
    "together": "all edges go from base to donor together: an edge counts that does something only beside others, and "
    "half way a shut door is half open",
    "broken": "two edges are needed at once (u and B, or u and dt); each alone does nothing and is left out, and the "
    "chain with it: single effects do not give this circuit",
    "size": "how much is read, not what for: distractors are read too",
    "slope": "where the metric could be moved, not what moved it: tokens count that are the same in both runs",
    "made": "what the base's answer is made from, not what the donor would change: tokens count that are the same in "
    "both runs, and the last one, which opens the gate",
    "read": "distractors that carry the tokens can be read as well: what can be decoded need not be used",
    "mean": "the mean step size is that of the few tokens that open; at all others nothing fades",
    "control": "size is no evidence: this must fail",
}
WHY: dict[tuple[str, str], str] = {
    ("`attribution_grid`, `resid_pre`", "latch"): "saturated",
    ("`attribution_grid`, `resid_pre`", "two"): "product",
    ("`edge_attribution`", "latch"): "saturated",
    ("`edge_attribution`", "two"): "product",
    **{("`edge_attribution`, 8 steps", name): "together" for name in ("latch", "two")},
    **{
        (f"`prune` of `{of}`", name): "broken" for of in ("path_patch", "edge_attribution") for name in ("latch", "two")
    },
    **{
        (method, name): "size"
        for method in ("`attention`, of the block, by size", "`receptive_field`")
        for name in MODELS
    },
    **{("`gradient_field`", name): "slope" for name in MODELS},
    **{("`relevance`, `embed`", name): "made" for name in MODELS},
    **{("`probe`, channel by channel", name): "read" for name in MODELS if name != "delay"},
    ("`half_lives`, of the mean dt", "latch"): "mean",
    **{(f"control: largest {what}", name): "control" for what in ("state", "difference") for name in MODELS},
}


def results(seeds: int) -> dict[str, Any]:
    """The scores, with where they come from."""
    found = score_all(METHODS, range(seeds))
    command = f"python -m analyses.planted --seeds {seeds}"
    return {"report": REPORT, "seeds": seeds, "scores": found, "provenance": provenance(command=command)}


def cell(method: str, name: str, score: dict[str, Any]) -> str:
    """recall / precision, and the letter of the reason."""
    if not any(score["there"]) and not any(score["reported"]):
        return "nothing"
    text = f"{score['recall']:.2f} / {score['precision']:.2f}"
    reason = WHY.get((method, name))
    return text if reason is None else f"{text} {_letter(reason)}"


def markdown(found: dict[str, Any]) -> str:
    """The table, and its notes."""
    scores: Table = found["scores"]
    lines = [f"| method | {' | '.join(f'`{name}`' for name in MODELS)} |", "|---" * (1 + len(MODELS)) + "|"]
    for method, row in scores.items():
        lines.append(f"| {method} | {' | '.join(cell(method, name, row[name]) for name in MODELS)} |")
    used = [reason for reason in REASONS if reason in WHY.values()]
    notes = [f"- {_letter(reason)} {REASONS[reason]}." for reason in used]
    return "\n".join([*lines, "", *notes]) + "\n"


def _letter(reason: str) -> str:
    return f"({'abcdefghijklmnop'[list(REASONS).index(reason)]})"
