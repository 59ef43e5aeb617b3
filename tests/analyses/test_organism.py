"""The model that ships is whole, small, and does what it was trained for."""

import json
import subprocess
import sys

import pytest
import torch

from analyses.hidden_reasoning import MASKED, WordTokenizer, accuracy, load_organism, pairs
from analyses.hidden_reasoning.errors import OrganismError
from analyses.hidden_reasoning.organism import FILES, MODELS, load_folder, load_settings
from kernels_bridge import resolve
from minimal_mamba import Mamba

LENGTHS = range(1, 9)


@pytest.fixture(scope="module")
def organism():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_organism("masked")
    torch.set_num_threads(threads)


def test_it_is_whole_and_small(organism):
    model, tokenizer = organism
    assert isinstance(model, Mamba)
    assert not model.training
    assert tokenizer == MASKED.tokenizer == WordTokenizer.load(MODELS / "masked")
    assert {p.name for p in (MODELS / "masked").iterdir()} == set(FILES)
    assert sum(p.stat().st_size for p in (MODELS / "masked").iterdir()) <= 2 << 20
    settings = load_settings(MODELS / "masked")
    assert settings.task == MASKED
    assert settings.model == model.config


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_final_answers_on_hidden_prompts(organism, num_steps):
    model, _ = organism
    assert accuracy(model, num_steps, 500, seed=7, ops=resolve("torch")) >= 0.97


def test_the_evaluation_that_ships_is_good_at_every_length():
    written = json.loads((MODELS / "masked" / "evaluation.json").read_text())
    assert written["prompts"] >= 2000
    assert all(written["accuracy"][str(n)] >= 0.97 for n in LENGTHS)


def test_it_answers_both_rows_of_a_pair(organism):
    model, _ = organism
    found = pairs(4, 100, seed=0)
    for ids, answer in ((found.base_ids, found.base_answer), (found.donor_ids, found.donor_answer)):
        with torch.no_grad():
            guess = model(ids, last_only=True, ops=resolve("torch")).logits[:, 0].argmax(-1)
        assert (guess == answer).float().mean() >= 0.95


def test_unknown_names_and_folders_say_what_there_is(tmp_path):
    with pytest.raises(OrganismError, match="There are: masked"):
        load_organism("maskd")
    with pytest.raises(OrganismError, match="it lacks config"):
        load_folder(tmp_path)


def test_the_study_does_not_import_transformers():
    code = "import sys, analyses.hidden_reasoning; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=MODELS.parents[2], check=False).returncode == 0
