"""The table of scores is that of the results, the results are those of the methods, and every miss has its reason."""

import json
from pathlib import Path

import pytest
import torch

from analyses.planted import MODELS, plant
from analyses.planted import scores as scoring
from analyses.planted.battery import METHODS
from analyses.planted.table import REASONS, WHY, markdown

FOLDER = Path(scoring.__file__).parent
RESULTS = json.loads((FOLDER / "results.json").read_text())
SLOW = [m for m in METHODS if "path_patch" in m or "probe" in m]
FAST = [(m, list(MODELS)[i % len(MODELS)]) for i, m in enumerate(m for m in METHODS if m not in SLOW)]


OF_THE_STATE = ("`attribution_grid`, `ssm_state`", "`attribution_grid`, `state_write`")  # where the answer is linear
WRITTEN = "`relevance`, `state_write`"  # of which the closed form is known, and `relevance` half
LENSES = ("`logit_lens`", "`direct_logit`", "`state_lens`")
EXACT = ("`patch_grid`", "`path_patch`", "`ablate`", "`freeze`", "`forget`", *LENSES, *OF_THE_STATE, WRITTEN)


def test_the_page_shows_the_results():
    assert markdown(RESULTS) in (FOLDER / "README.md").read_text()
    assert list(RESULTS["scores"]) == list(METHODS)
    assert all(list(row) == list(MODELS) for row in RESULTS["scores"].values())
    assert not RESULTS["provenance"]["commit"].endswith("+changes")
    attributed = [s["error"] for m, row in RESULTS["scores"].items() if "attribution" in m for s in row.values()]
    assert f"errs by up to {max(attributed):.0f} times the gap" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(("method", "name"), FAST)
def test_the_results_are_what_the_methods_find(method, name):
    """Each method on one of the models, the first draw; `path_patch` and probes take seconds and are left out."""
    found, told = scoring.score(METHODS[method], name, [0]), RESULTS["scores"][method][name]
    assert (found["there"][0], found["reported"][0]) == (told["there"][0], told["reported"][0])
    assert found["recall"] >= told["recall"] and found["precision"] >= told["precision"]  # told: the worst of all draws
    if told["error"] is not None:
        assert found["error"] <= told["error"] + 1e-9


def test_every_miss_has_a_reason_and_every_reason_a_miss():
    missed = {
        (method, name)
        for method, row in RESULTS["scores"].items()
        for name, score in row.items()
        if min(score["recall"], score["precision"]) < 1
    }
    assert missed == set(WHY)
    assert set(WHY.values()) == set(REASONS)


def test_exact_methods_are_exact_and_the_controls_fail():
    for method, row in RESULTS["scores"].items():
        for name, score in row.items():
            if method.startswith(EXACT):
                assert score["recall"] == score["precision"] == 1 and score["error"] < 1e-9, (method, name)
            if method.startswith("control"):
                assert score["precision"] == 0


def test_recall_and_precision_count_both_ways():
    found = scoring.Found({(0, 1), (0, 2), (1, 1)}, {(0, 1), (2, 2)})
    assert (found.recall, found.precision) == (0.5, 1 / 3)
    assert (scoring.Found(set(), {(1,)}).recall, scoring.Found(set(), set()).precision) == (0, 1)
    p = plant("accumulator", 0)
    everywhere = torch.ones_like(p.truth.effects["ssm_state"])
    assert scoring.compare(p, everywhere, p.truth.effects["ssm_state"]).precision < 0.5
    assert scoring.compare(p, 0 * everywhere, p.truth.effects["ssm_state"]).recall == 0
    right = scoring.compare(p, p.truth.effects["ssm_state"], p.truth.effects["ssm_state"])
    assert (right.recall, right.precision, right.error) == (1, 1, 0)
