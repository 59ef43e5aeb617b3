"""The README's examples run, and say what the README says they say."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import pytest

from analyses.benchmarks import report
from analyses.hidden_reasoning import findings
from analyses.hidden_reasoning.drawing.trainings import scores
from analyses.hidden_reasoning.experiments.results import RESULTS
from analyses.hidden_reasoning.organism import MODELS
from analyses.pages import placed
from kernels_bridge import torch_scan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_first_example_is_short_and_hands_over_the_value():
    printed = io.StringIO()
    assert len(BLOCKS[0].strip().splitlines()) <= 22
    with contextlib.redirect_stdout(printed):
        exec(compile(BLOCKS[0], "README.md", "exec"), {})
    conv, ssm, shape = printed.getvalue().splitlines()[:3]
    assert (conv, ssm) == ("4", "0")
    assert shape == "torch.Size([1, 160, 3])"


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_other_examples_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_every_file_that_it_names_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("l", [1, 7, 15, 16, 17, 22, 63, 500])
def test_the_scan_keeps_no_more_states_than_it_says(l):
    assert "at most one state for every 16 tokens of a row, begun or whole" in README
    for b, e, n, threads in itertools.product((1, 64), (24, 1536, 5120), (5, 16, 128), (1, 8)):
        assert -(-l // torch_scan.cut(b, l, e, n, threads)[1]) <= -(-l // 16)


def test_the_tables_of_times_are_those_of_the_results():
    results = report.load()
    assert placed(README, "benchmarks", report.markdown(results)) == README
    for work, least in {"forward S, batch 8, length 256": 3, "training step S, batch 16, length 256": 3.5}.items():
        assert report.best(results[work])[1] >= least


def test_the_studys_numbers_are_those_of_its_files():
    page = findings.PAGE.read_text()
    assert findings.page(page) == page
    recipes = {name: json.loads((MODELS / name / "recipe.json").read_text()) for name in ("masked", "transformer")}
    steps = {name: recipe["steps"] for name, recipe in recipes.items()}
    assert f"came to 5 operations in {steps['transformer']:,} steps, the Mamba to 12 in {steps['masked']:,}." in page
    solved = {name: scores(findings.Folder(RESULTS)[f"evaluate-{name}"]) for name in steps}
    for name, longest in {"masked": 12, "transformer": 5}.items():
        assert [n for n, score in solved[name].items() if score.share >= 0.9][-1] == longest
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert "://" in target or (findings.PAGE.parent / target).exists(), target
