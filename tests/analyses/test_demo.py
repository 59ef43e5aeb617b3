"""The demo: its figures and numbers, on the model that ships."""

import json
import re

import pytest
from typer.testing import CliRunner

from analyses.hidden_reasoning.__main__ import app
from analyses.hidden_reasoning.experiments.demo import sweep
from analyses.hidden_reasoning.organism import load_organism
from analyses.planted.__main__ import app as planted

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def found():
    return sweep(load_organism("masked")[0], num_steps=3, which_step=1, n=20, progress=False)


def test_the_whole_memory_is_a_full_hand_over_once_the_words_agree(found):
    share = found.ceiling.recovered()[0]
    assert share[: found.echo].abs().max() < 0.05  # until its echo, the word itself decides
    assert (share[found.echo : -1] - 1).abs().max() < 1e-4


def test_before_the_pair_differs_nothing_moves(found):
    differs = int(found.pairs.positions[0, 0])
    # the same numbers in other sums: nothing but float32's rounding, 1e-7 of logits of order ten
    assert found.state.effect()[:, :differs].abs().max() < 5e-5
    assert found.words[differs] == found.words[found.echo] == "op2*"


def test_the_command_writes_figures_and_says_what_they_show(tmp_path):
    out = tmp_path / "demo"
    result = RUNNER.invoke(app, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "results.json").read_text())
    assert all(sentence in result.output for sentence in written["sentences"])
    assert len(written["sentences"]) == 3
    assert written["provenance"]["command"].endswith("--pairs 20 --num-steps 3 --differ 2 --seed 0")
    for name in ("memories_patched", "memories_by_word"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("option", "text"),
    [(["--differ", "6"], "one of 1..5 may differ"), (["--differ", "0"], "greater than or equal|x>=1")],
)
def test_an_operation_that_is_not_there(tmp_path, option, text):
    result = RUNNER.invoke(app, ["demo", "--out", str(tmp_path), *option])
    assert result.exit_code == 2
    assert re.search(text, result.output)  # typer before it went on without click says x>=1


@pytest.mark.parametrize(
    ("app", "work"),
    [(app, "analyses.hidden_reasoning.experiments.demo.sweep"), (planted, "analyses.planted.table.results")],
)
def test_a_folder_that_cannot_be_is_refused_before_the_work(app, work, tmp_path, monkeypatch):
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    arguments = ["demo"] if "demo" in work else []
    for out in (tmp_path / "file", tmp_path / "file" / "in"):
        result = RUNNER.invoke(app, [*arguments, "--out", str(out)])
        assert result.exit_code == 2, result.output
        assert "is a file, or in one" in " ".join(result.output.replace("│", " ").split())
