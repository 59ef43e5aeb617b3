"""The command line: every command is quick with --quick, goes on where it stopped, and says errors in a sentence."""

import json
import shutil
import time

import pytest
from typer.testing import CliRunner

from analyses.hidden_reasoning.__main__ import app
from analyses.hidden_reasoning.drawing import FIGURES
from analyses.hidden_reasoning.organism import load_folder, load_settings

RUNNER = CliRunner()
QUICK = 60  # seconds of a processor; 15 on a machine of its own


def invoke(*arguments):
    begin = time.process_time()
    found = RUNNER.invoke(app, [str(a) for a in arguments])
    assert found.exit_code == 0, found.output
    assert time.process_time() - begin < QUICK
    return found.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model of each kind, as the command leaves it: name -> folder."""
    runs = tmp_path_factory.mktemp("runs")
    kinds = {"masked": [], "doublethink": ["--task", "doublethink"], "transformer": ["--architecture", "transformer"],
             "state_only": ["--d-conv", "1"]}  # fmt: skip
    for name, more in kinds.items():
        invoke("train", "--quick", "--out", runs / name, "--seed", 3, "--threads", 1, *more)
    return {name: runs / name / "organism" for name in kinds}


def test_quick_training_leaves_an_organism_that_evaluates(trained, tmp_path):
    folder = trained["masked"]
    model, tokenizer = load_folder(folder)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert load_settings(folder).seed == 3
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["command"].endswith(
        "--out runs/masked --seed 3 --steps 60 --max-length 3 --batch-size 32 --d-model 32 --n-layer 2"
    )
    assert recipe["provenance"]["packages"].keys() >= {"torch", "transformers"}

    scores = tmp_path / "scores.json"
    invoke("evaluate", "--quick", "--model", folder, "--max-length", 2, "--out", scores, "--seed", 0)
    written = json.loads((folder / "evaluation.json").read_text())["lengths"]
    ours = json.loads(scores.read_text())
    for n in ("1", "2"):
        assert {k: written[n][k] for k in ("right", "prompts", "written")} == {
            k: ours["parts"][f"concealed, length {n}"][k] for k in ("right", "prompts", "written")
        }
    assert ours["key"]["name"] == "masked"

    invoke("train", "--resume", "--out", folder.parent, "--prompts", 50)
    assert json.loads((folder / "evaluation.json").read_text())["lengths"]["3"]["prompts"] == 50


def test_every_experiment_and_figure_with_quick(trained, tmp_path):
    """The whole way from models to figures; a second call computes nothing anew."""
    results = tmp_path / "results"
    calls = [("evaluate", name) for name in trained] + [
        (kind, name) for kind in ("patch", "probe") for name in ("masked", "doublethink")
    ]
    calls += [("patch", "state_only"), ("align", "masked"), ("align", "state_only")]
    for kind, name in calls:
        out = results / f"{kind}-{name}.json"
        invoke(kind, "--quick", "--model", trained[name], "--out", out)
        before = out.stat().st_mtime_ns
        invoke(kind, "--quick", "--model", trained[name], "--out", out)
        assert out.stat().st_mtime_ns == before
    for acts in ("arithmetic", "s5"):
        invoke("shortcuts", "--quick", "--acts", acts, "--out", results / f"shortcuts-masked-{acts}.json")
    invoke("curves", "--quick", "--out", results / "curves-all.json")
    invoke("figures", "--results", results, "--out", tmp_path / "figures")
    made = {p.name for p in (tmp_path / "figures").iterdir()}
    assert made == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    for path in (tmp_path / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")

    stale = json.loads((results / "patch-masked.json").read_text())
    (results / "patch-masked.json").write_text(json.dumps(stale | {"version": 0}))
    found = RUNNER.invoke(app, ["figures", "--results", str(results), "--out", str(tmp_path / "again")])
    assert found.exit_code == 2
    assert "version 0" in found.stderr and "again" in found.stderr and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "command", ["shortcuts", "evaluate", "patch", "probe", "align", "figures", "demo", "train", "curves"]
)
def test_help_and_quick_leave_nothing_behind(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--quick" in RUNNER.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    if command in ("shortcuts", "figures"):
        invoke(command, "--quick")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train --max-length 0 --quick", "at least 1"),
        ("train --steps 0 --quick", "at least 1"),
        ("train --task maskd --quick", "'masked'"),
        ("train --loss answer --quick", "weighted, reasoning, all"),
        ("train --modulus 2 --quick", "same operation"),
        ("train --resume --out nowhere", "nothing to resume"),
        ("train --quick --device nonsense", "cannot be used here"),
        ("train --quick --tokenizer .", "no tokenizer"),
        ("evaluate --model nowhere", "no organism"),
        ("evaluate --max-length 0", "at least one step"),
        ("patch --model transformer --quick", "no state"),
        ("patch --differ 9 --num-steps 3", "operations 1..3"),
        ("demo --num-steps 6 --differ 6", "one of 1..5 may differ"),
        ("train --quick --report-to nowhere", "nowhere"),
        ("shortcuts --task maskd", "'masked'"),
        ("shortcuts --max-length 60", "multisets"),
        ("figures --results nowhere", "no results"),
    ],
)
def test_errors_are_a_sentence(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = RUNNER.invoke(app, arguments.split())
    assert found.exit_code == 2
    assert says in found.stderr
    assert "Traceback" not in found.output
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_training_whose_prompts_are_too_few_to_hold_any_out_keeps_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--operations", "double,triple", "--max-length", "4", "--steps", "10", "--prompts", "8"]
    said = invoke("train", "--quick", "--out", "run", *options)
    assert "of the 16 prompts of 4 operations none was held out" in said
    kept = json.loads((tmp_path / "run/organism/evaluation.json").read_text())
    assert [*kept["lengths"]] == ["1", "2", "3"]
    said = invoke("evaluate", "--model", "run/organism", "--max-length", "4", "--prompts", "8")
    assert "none was held out" in said


def test_results_that_are_drawn_together_are_of_one_model_and_of_one_kind_of_run(trained, tmp_path):
    out = tmp_path / "patch-masked.json"
    invoke("patch", "--quick", "--model", trained["masked"], "--out", out)
    whole = ["patch", "--num-steps", "3", "--differ", "1", "--pairs", "6", "--prompts", "20", "--out", str(out)]
    found = RUNNER.invoke(app, [*whole, "--model", str(trained["masked"])])  # of the same numbers, but all layers
    assert found.exit_code == 2 and "quick=True (now False)" in found.stderr
    invoke("evaluate", "--quick", "--model", trained["masked"], "--out", tmp_path / "evaluate-masked.json")
    other = json.loads((tmp_path / "evaluate-masked.json").read_text())
    for key, says in ({"model": "other"}, "another model"), ({"modulus": 4}, "another modulus"):
        (tmp_path / "evaluate-masked.json").write_text(json.dumps(other | {"key": other["key"] | key}))
        invoke("shortcuts", "--quick", "--out", tmp_path / "shortcuts-masked-arithmetic.json")
        found = RUNNER.invoke(app, ["figures", "--quick", "--results", str(tmp_path)])
        assert found.exit_code == 2 and says in found.stderr
    (tmp_path / "evaluate-masked.json").write_text('{"kind": "evaluate", "version": 1}')
    found = RUNNER.invoke(app, ["figures", "--quick", "--results", str(tmp_path)])
    assert found.exit_code == 2 and "is no results file" in found.stderr


def test_a_model_of_another_task_is_refused_where_results_are(trained, tmp_path):
    out = tmp_path / "r.json"
    invoke("evaluate", "--quick", "--model", trained["masked"], "--out", out)
    found = RUNNER.invoke(app, ["evaluate", "--quick", "--model", str(trained["doublethink"]), "--out", str(out)])
    assert found.exit_code == 2
    assert "task='masked' (now 'doublethink')" in found.stderr


def test_a_checkpoint_of_another_task_is_not_trained_on(trained, tmp_path):
    run = trained["masked"].parent
    found = RUNNER.invoke(app, ["train", "--resume", "--task", "doublethink", "--out", str(run)])
    assert found.exit_code == 2
    assert "task_name='masked' (now 'doublethink')" in found.stderr


def test_models_of_other_words_or_rules_are_refused(trained, tmp_path, monkeypatch):
    """Their tokens would be others, or their answers, and every number nonsense."""
    monkeypatch.chdir(tmp_path)
    for name, acts in (("direct", ["--task", "direct"]), ("s5", ["--acts", "s5"])):
        invoke("train", "--quick", "--out", name, "--steps", 4, *acts)
    own = tmp_path / "own"
    shutil.copytree(trained["masked"], own)
    words = json.loads((own / "recipe.json").read_text())
    (own / "recipe.json").write_text(json.dumps(words | {"settings": words["settings"] | {"modulus": 7}}))
    for arguments, says in (
        (["demo", "--model", "direct/organism"], "trained on direct; this command asks masked"),
        (["demo", "--model", "s5/organism", "--quick"], "other rules"),
        (["probe", "--model", "direct/organism", "--quick"], "this command asks masked or doublethink"),
        (["align", "--site", "u"], "is no memory"),
        (["align", "--step", "6"], "give 1..5"),
        (
            ["patch", "--model", str(trained["doublethink"]), "--num-steps", "4", "--differ", "3"],
            "one of 1..2 may differ",
        ),
        (["patch", "--model", "own", "--quick"], "tokenizer of its own"),
        (["figures", "--quick", "--into", str(trained["masked"] / "recipe.json")], "put <!-- models -->"),
    ):
        found = RUNNER.invoke(app, arguments)
        assert found.exit_code == 2, (arguments, found.output)
        assert says in found.stderr and "Traceback" not in found.output
