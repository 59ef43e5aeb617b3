"""The command line: quick runs, and errors in a sentence."""

import json
import time

import pytest
from typer.testing import CliRunner

from analyses.hidden_reasoning.__main__ import app
from analyses.hidden_reasoning.organism import load_folder, load_settings

RUNNER = CliRunner()


def test_quick_training_leaves_an_organism_that_evaluates(tmp_path):
    out, start = tmp_path / "run", time.perf_counter()
    found = RUNNER.invoke(app, ["train", "--quick", "--out", str(out), "--seed", "3", "--threads", "1"])
    assert found.exit_code == 0, found.output
    assert time.perf_counter() - start < 60  # 15 on a machine of its own
    model, tokenizer = load_folder(out / "organism")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert load_settings(out / "organism").seed == 3
    recipe = json.loads((out / "organism" / "recipe.json").read_text())
    assert recipe["command"].endswith(
        "--out runs/masked --seed 3 --steps 60 --max-length 3 --batch-size 32 --d-model 32 --n-layer 2"
    )
    assert recipe["provenance"]["packages"].keys() >= {"torch", "transformers"}

    scores = tmp_path / "scores.json"
    folder = str(out / "organism")
    found = RUNNER.invoke(
        app, ["evaluate", "--quick", "--model", folder, "--max-length", "2", "--out", str(scores), "--seed", "0"]
    )
    assert found.exit_code == 0, found.output
    written = json.loads((out / "organism" / "evaluation.json").read_text())
    ours = json.loads(scores.read_text())
    assert {k: written["accuracy"][k] for k in ("1", "2")} == ours["accuracy"]
    assert ours["prompts"] == 100

    again = RUNNER.invoke(app, ["train", "--resume", "--out", str(out), "--prompts", "50"])
    assert again.exit_code == 0, again.output
    assert json.loads((out / "organism" / "evaluation.json").read_text())["prompts"] == 50


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --max-length 0 --quick", "at least 1"),
        ("train --steps 0 --quick", "at least 1"),
        ("train --resume --out nowhere", "nothing to resume"),
        ("train --quick --device nonsense", "cannot be used here"),
        ("evaluate --model nowhere", "no organism"),
        ("evaluate --max-length 0", "at least one step"),
    ],
)
def test_errors_are_a_sentence(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = RUNNER.invoke(app, arguments.split())
    assert found.exit_code == 2
    assert says in found.stderr
    assert "Traceback" not in found.output
    assert not list(tmp_path.iterdir())
