"""`python -m analyses.methods._agreement`: how attribution and relevance agree with exact runs, the gallery's tables.

Results go to `agreement.json` beside this file, the tables into the gallery's page; 3 minutes.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analyses.hidden_reasoning import load_organism, pairs
from analyses.pages import placed
from interp import Agreement, Grid, agreement, attribution_grid, logit_diff, patch_grid
from minimal_mamba.files import write_json, write_text
from minimal_mamba.provenance import provenance

from . import relevance
from .attribution import SITES

RESULTS, PAGE = Path(__file__).with_name("agreement.json"), Path(__file__).with_name("README.md")
PAIRS, STEPS, SEED = 100, 20, 0
SIZES = ((0.02, 0.3), (0.3, 1), (1, 5), (5, 40))  # nats
ESTIMATES = {"at the base": 0, f"along the embeddings, {STEPS} steps": STEPS}


def measure() -> dict[str, dict[str, Any]]:
    """Of each site and estimate the `Agreement` with the exact sweep, and how small and large effects come out."""
    model, _ = load_organism("shallow")
    found = pairs(num_steps=4, n=PAIRS, which_step=1, seed=SEED)

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, found.donor_answer, found.base_answer)

    def one(site: str) -> dict[str, Any]:
        given: dict[str, Any] = {"site": site, "metric": metric, "progress": False}
        exact = patch_grid(model, found.base_ids, found.donor_ids, **given)
        said = {}
        for name, steps in ESTIMATES.items():
            estimate = attribution_grid(model, found.base_ids, found.donor_ids, steps=steps, **given)
            said[name] = {
                "agreement": vars(agreement(estimate, exact)),
                "sizes": {f"{low} to {high} nats": _sizes(estimate, exact, low, high) for low, high in SIZES},
            }
        return said

    return {site: one(site) for site in SITES}


def measure_relevance() -> dict[str, dict[str, Any]]:
    """Of each site the `Agreement` of relevance, and of gradient x input, with what is lost when a cell is zeroed."""
    model, _ = load_organism("shallow")
    found, sites = pairs(num_steps=4, n=PAIRS, which_step=1, seed=SEED), dict[str, dict[str, Any]]()
    for site in relevance.SITES:
        grids = relevance.shares(model, found, site)
        exact, share = grids["exact"].effect(), grids["relevance"].effect()
        sites[site] = {
            name: {"agreement": vars(agreement(grids[name], grids["exact"]))} for name in relevance.COLOURS
        } | {
            "metric": float(grids["exact"].base.mean()),
            "sums": {"exact": float(exact.sum((0, 1)).mean()), "relevance": float(share.sum((0, 1)).mean())},
            "on cells that cost below 0.1 nat": float(share.abs()[exact.abs() < 0.1].sum() / share.abs().sum()),
        }
    return sites


def _sizes(estimate: Grid, exact: Grid, low: float, high: float) -> dict[str, float]:
    """Of exact effects of a size: their count, the slope of the estimate on them, its error, |difference| / |exact|."""
    x, y = estimate.effect().flatten(), exact.effect().flatten()
    there = (y.abs() >= low) & (y.abs() < high)
    x, y = x[there], y[there]
    return {"count": len(y), "slope": float(x @ y / (y @ y)), "error": float((x - y).norm() / y.norm())}


def markdown(sites: dict[str, Any], estimates: Iterable[str]) -> str:
    """A table of the page."""
    heads = [f"{name}: Pearson, Spearman" for name in estimates]
    rows = [["site", *heads], ["---"] * (1 + len(heads))]
    for site, found in sites.items():
        several = [Agreement(**found[name]["agreement"]) for name in estimates]
        rows.append([f"`{site}`", *(f"{_said(a.pearson)}, {_said(a.spearman)}" for a in several)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its two tables."""
    text = placed(text, "agreement", markdown(results["sites"], [*ESTIMATES]))
    return placed(text, "relevance", markdown(results["relevance"], [*relevance.COLOURS]))


def _said(found: tuple[float, float, float]) -> str:
    value, low, high = found
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = f"python -m {__package__}._agreement"
    made = {"sites": measure(), "relevance": measure_relevance()}
    write_json(RESULTS, made | {"provenance": provenance(command=command, seed=SEED, pairs=PAIRS)})
    write_text(PAGE, page(PAGE.read_text(), json.loads(RESULTS.read_text())))
