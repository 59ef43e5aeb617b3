"""The models that ship are whole, small, and do what they were trained for."""

import json
import subprocess
import sys

import pytest
import torch

from analyses.hidden_reasoning import DOUBLETHINK, MASKED, WordTokenizer, load_organism, pairs, score
from analyses.hidden_reasoning.errors import OrganismError
from analyses.hidden_reasoning.experiments.results import fingerprint, read
from analyses.hidden_reasoning.organism import FILES, MODELS, load_folder, load_settings, organism_folder
from kernels_bridge import resolve
from minimal_mamba import Mamba

SHIPS = {
    "masked": (MASKED, 12),
    "doublethink": (DOUBLETHINK, 10),
    "transformer": (MASKED, 12),
    "state_only": (MASKED, 7),
    "shallow": (MASKED, 7),
}
# a transformer has no state; `shallow` is for the gallery of methods
KINDS = {"masked": ["evaluate", "patch", "probe"], "doublethink": ["evaluate", "patch", "probe"],
         "transformer": ["evaluate"], "state_only": ["evaluate", "patch", "probe"]}  # fmt: skip
RESULTS = MODELS.parent / "results"


@pytest.mark.parametrize("name", SHIPS)
def test_it_is_whole_and_small(name):
    task, longest = SHIPS[name]
    model, tokenizer = load_folder(organism_folder(name))
    settings = load_settings(MODELS / name)
    assert isinstance(model, Mamba) == (settings.architecture == "mamba") == (name != "transformer")
    assert not model.training
    assert tokenizer == task.tokenizer == WordTokenizer.load(MODELS / name)
    assert {p.name for p in (MODELS / name).iterdir()} == set(FILES)
    assert sum(p.stat().st_size for p in (MODELS / name).iterdir()) <= 3 << 20
    assert settings.task == task
    assert settings.max_length == longest
    assert json.loads((MODELS / name / "recipe.json").read_text())["command"].startswith("python -m analyses")


def test_every_model_that_ships_is_tested():
    assert {p.name for p in MODELS.iterdir()} == {*SHIPS}


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [("masked", 1), ("masked", 4), ("masked", 9), ("masked", 12), ("doublethink", 1), ("doublethink", 10),
     ("shallow", 7), ("state_only", 6)],
)  # fmt: skip
def test_final_answers_on_held_out_prompts(name, num_steps):
    task, _ = SHIPS[name]
    assert score(load_organism(name)[0], num_steps, 400, seed=7, task=task).share >= 0.95


@pytest.mark.parametrize("name", ["masked", "doublethink"])
def test_the_evaluation_that_ships_is_good_at_every_length(name):
    found = json.loads((MODELS / name / "evaluation.json").read_text())["lengths"]
    assert [*map(int, found)] == list(range(1, SHIPS[name][1] + 1))
    for n, one in found.items():
        assert one["right"] / one["prompts"] >= 0.97
        assert one["prompts"] >= 2000 or int(n) <= 5  # of the short ones there are no more
        assert one["seen"] == (int(n) < 4)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in KINDS for kind in KINDS[name]])
def test_the_results_that_ship_are_of_the_models_that_ship(name, kind):
    made = read(RESULTS / f"{kind}-{name}.json", kind)
    assert made["key"]["model"] == fingerprint(load_folder(MODELS / name)[0])
    assert made["provenance"]["command"].startswith(f"python -m analyses.hidden_reasoning {kind} --model {name}")


def test_it_answers_both_rows_of_a_pair():
    model, _ = load_organism("masked")
    found = pairs(4, 100, seed=0)
    for ids, answer in ((found.base_ids, found.base_answer), (found.donor_ids, found.donor_answer)):
        with torch.no_grad():
            guess = model(ids, last_only=True, ops=resolve("torch")).logits[:, 0].argmax(-1)
        assert (guess == answer).float().mean() >= 0.95


def test_unknown_names_and_folders_say_what_there_is(tmp_path):
    with pytest.raises(OrganismError, match="There are: doublethink, masked, shallow, state_only, transformer"):
        load_organism("maskd")
    with pytest.raises(OrganismError, match="it lacks config"):
        load_folder(tmp_path)
    with pytest.raises(OrganismError, match="has no state"):
        load_organism("transformer")


def test_the_study_does_not_import_transformers():
    code = "import sys, analyses.hidden_reasoning; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=MODELS.parents[2], check=False).returncode == 0
