"""Organisms: trained models with all that is known of how they came about, one folder each.

config.json, model.safetensors   the model, in mamba-ssm's layout
tokenizer.json                   its words
recipe.json                      task, settings, seed, command, versions
train_log.jsonl                  the training: step, loss, limit, accuracy by length, seconds
evaluation.json                  final answers on fresh hidden prompts, by length
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from minimal_mamba import Mamba
from minimal_mamba.errors import nearest
from minimal_mamba.files import write_json
from minimal_mamba.provenance import provenance

from .errors import OrganismError
from .settings import Settings, replace_folder
from .tokenizer import WordTokenizer

MODELS = Path(__file__).parent / "models"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "recipe.json", "train_log.jsonl", "evaluation.json")


def load_organism(name: str = "masked") -> tuple[Mamba, WordTokenizer]:
    """A model that ships with the study, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        OrganismError: there is none of this name, or its folder is not whole; the text lists what there is.
    """
    return load_folder(organism_folder(name))


def organism_folder(name: str) -> Path:
    """Where an organism that ships lies; raises OrganismError for an unknown name."""
    known = sorted(p.name for p in MODELS.glob("*") if p.is_dir())
    if name not in known:
        there = ", ".join(known) if known else "none"
        raise OrganismError(f"no organism {name!r}.{nearest(name, known)} There are: {there}.")
    return MODELS / name


def load_folder(folder: str | Path) -> tuple[Mamba, WordTokenizer]:
    """The model and the tokenizer of an organism's folder, as `write_organism` makes it."""
    folder = _whole(folder)
    tokenizer = WordTokenizer.load(folder)
    model = Mamba.from_pretrained(folder).eval()
    if tokenizer.vocab_size != model.config.vocab_size:
        raise OrganismError(
            f"{folder}: {tokenizer.vocab_size} words for a model of {model.config.vocab_size}; copy it again."
        )
    return model, tokenizer


def load_settings(folder: str | Path) -> Settings:
    """The settings that the organism in a folder was trained with."""
    return Settings(**json.loads((_whole(folder) / "recipe.json").read_text())["settings"])


def write_organism(
    run: Path, model: Mamba, settings: Settings, accuracy: dict[int, float], prompts: int, seed: int
) -> Path:
    """Write the organism of a finished run into its folder `organism`, whole or not at all.

    Args:
        run: folder of the run, with its `train_log.jsonl`. accuracy: by length, of `prompts` prompts drawn with `seed`.
    Returns:
        the folder.
    """
    part, folder = run / "organism.part", run / "organism"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    model.save_pretrained(part)
    settings.task.tokenizer.save(part)
    shutil.copyfile(run / "train_log.jsonl", part / "train_log.jsonl")
    last = json.loads((part / "train_log.jsonl").read_text().splitlines()[-1])
    recipe = {
        "task": "masked",
        "seed": settings.seed,
        "command": settings.command,
        "steps": last["step"],
        "seconds": last["seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": dataclasses.asdict(settings),
        "provenance": provenance(threads=torch.get_num_threads()),
    }
    write_json(part / "recipe.json", recipe)
    found = {"final answers": "exact, on fresh hidden prompts", "prompts": prompts, "seed": seed}
    write_json(part / "evaluation.json", found | {"accuracy": {str(k): v for k, v in accuracy.items()}})
    replace_folder(part, folder)
    return folder


def _whole(folder: str | Path) -> Path:
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise OrganismError(
            f"{folder} is no organism: it lacks {', '.join(missing)}. `python -m analyses.hidden_reasoning train` "
            "writes one into the folder `organism` of its run."
        )
    return folder
