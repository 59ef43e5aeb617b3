"""Organisms: trained models with all that is known of how they came about, one folder each.

config.json, model.safetensors   the model: a Mamba in mamba-ssm's layout, or transformers' GPT-2
tokenizer.json                   its words
recipe.json                      task, settings, seed, command, versions
train_log.jsonl                  the training: step, loss, limit, accuracy by length, seconds
evaluation.json                  final answers on prompts that were held out, by length
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels_bridge import resolve
from minimal_mamba import Mamba, Ops
from minimal_mamba.errors import nearest
from minimal_mamba.files import write_json
from minimal_mamba.provenance import provenance

from .errors import OrganismError
from .task import Tokenizer, load_tokenizer
from .training.settings import Settings, replace_folder

MODELS = Path(__file__).parent / "models"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "recipe.json", "train_log.jsonl", "evaluation.json")


def load_organism(name: str = "masked") -> tuple[Mamba, Tokenizer]:
    """A Mamba that ships with the study, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        OrganismError: there is none of this name, or it is no Mamba, or its folder is not whole.
    """
    model, tokenizer = load_folder(organism_folder(name))
    if not isinstance(model, Mamba):
        raise OrganismError(f"{name} is a transformer, which has no state; load_folder(organism_folder(...)) loads it.")
    return model, tokenizer


def organism_folder(name: str) -> Path:
    """Where an organism that ships lies; raises OrganismError for an unknown name."""
    known = sorted(p.name for p in MODELS.glob("*") if p.is_dir())
    if name not in known:
        there = ", ".join(known) if known else "none"
        raise OrganismError(f"no organism {name!r}.{nearest(name, known)} There are: {there}.")
    return MODELS / name


def load_folder(folder: str | Path) -> tuple[nn.Module, Tokenizer]:
    """The model and the tokenizer of an organism's folder, as `write_organism` makes it."""
    folder = _whole(folder)
    tokenizer = load_tokenizer(folder)
    model = _load_model(folder, load_settings(folder).architecture)
    rows = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if tokenizer.vocab_size > rows:
        raise OrganismError(f"{folder}: {tokenizer.vocab_size} words for a model of {rows}; copy it again.")
    return model, tokenizer


def load_settings(folder: str | Path) -> Settings:
    """The settings that the organism in a folder was trained with; raises OrganismError for another version's."""
    recipe = json.loads((_whole(folder) / "recipe.json").read_text())
    try:
        return Settings(**recipe["settings"])
    except (KeyError, TypeError):
        raise OrganismError(
            f"{folder}/recipe.json is of another version of the study; train the model again."
        ) from None


def _load_model(folder: Path, architecture: str) -> nn.Module:
    if architecture == "mamba":
        return Mamba.from_pretrained(folder).eval()
    try:
        from transformers import GPT2LMHeadModel
    except ModuleNotFoundError:
        raise OrganismError(f"{folder} is a transformer; pip install 'mambascope[train]' to load it.") from None
    loaded: nn.Module = GPT2LMHeadModel.from_pretrained(str(folder))
    return loaded.eval()


def logits_of(model: nn.Module, ops: Ops | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """(ids (b, l), lengths (b,)) -> logits (b, l, v) of either kind of model; rows are padded on the right.

    Args:
        ops: of a Mamba; None: the fastest on its device.
    """
    if isinstance(model, Mamba):
        chosen = ops or resolve("auto", model.device)
        return lambda ids, lengths: model(ids, lengths=lengths, ops=chosen).logits
    return lambda ids, lengths: model(input_ids=ids, use_cache=False).logits  # causal: what comes first sees no padding


def write_organism(
    run: Path, model: nn.Module, tokenizer: Tokenizer, settings: Settings, evaluation: dict[str, Any]
) -> Path:
    """Write the organism of a finished run into its folder `organism`, whole or not at all.

    Args:
        run: folder of the run, with its `train_log.jsonl`. evaluation: what `evaluate` found.
    Returns:
        the folder.
    """
    part, folder = run / "organism.part", run / "organism"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    model.save_pretrained(part)  # type: ignore[operator]
    (part / "generation_config.json").unlink(missing_ok=True)  # transformers' own, of no use here
    tokenizer.save(part)
    shutil.copyfile(run / "train_log.jsonl", part / "train_log.jsonl")
    last = json.loads((part / "train_log.jsonl").read_text().splitlines()[-1])
    recipe = {
        "task": settings.task_name,
        "seed": settings.seed,
        "command": settings.command(run.name),
        "steps": last["step"],
        "seconds": last["seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": dataclasses.asdict(settings),
        "provenance": provenance(threads=torch.get_num_threads()),
    }
    write_json(part / "recipe.json", recipe)
    write_json(part / "evaluation.json", evaluation)
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
