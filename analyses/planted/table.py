"""The table of the scores, and why a method does not find what it does not find."""

import shlex
import sys
from typing import Any

from minimal_mamba.provenance import provenance

from .battery import METHODS
from .models import MODELS
from .scores import REPORT, Table, score_all

# By nature, not by fault: of each cell below 1 the reason. A test sees that no such cell is without one, and none idle.
REASONS: dict[str, str] = {
    "saturated": "the gate is shut in the base run: softplus is flat there, so a gradient sees no door to open",
    "product": "what is written is B u of the same token, both 0 in the base run: one alone does nothing, and the slope "
    "of a product of zeros is 0",
    "chain": "with all edges on their way together the gap is shared out along each chain: of a chain of m edges each "
    "gets a part, however much depends on it",
    "broken": "an edge without an effect of its own is left out, and the chain behind it goes with it",
    "size": "how much is read, not what for: distractors are read too, and more",
    "slope": "where the metric could be moved, not what moved it: tokens lean on the answer that are the same in both runs",
    "mean": "the mean step size is that of the few tokens that open; between them nothing fades",
    "control": "size is no evidence: this must fail",
}
WHY: dict[tuple[str, str], str] = {}


def results(seeds: int) -> dict[str, Any]:
    """The scores, with where they come from."""
    found = score_all(METHODS, range(seeds))
    command = shlex.join(["python", "-m", "analyses.planted", *sys.argv[1:]])
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
