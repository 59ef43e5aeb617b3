"""Many short trainings, to see what makes the task learnable: the loss, the depth, and which group the words generate.

Deeper models have more parameters; so some models are as large as others of another depth, `WIDTHS`.

Each run is a folder of its own under `runs`, resumed where it stood, and a part of the results when it has ended.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimal_mamba import Mamba

from ..training.settings import Settings
from .results import Read, Results

SEEDS = (0, 1, 2)
LOSS = {"max_length": 6, "steps": 1500, "decay_steps": 200, "early": 1.0}
DEPTH = {"max_length": 12, "steps": 1500, "decay_steps": 300, "early": 1.0}
REACH = DEPTH | {"max_length": 16}
DEPTHS = (2, 4, 6, 8, 10, 12)
WIDTHS = ((12, 40), (6, 116), (4, 144))  # layers, d_model: about as large as 4 layers of 80, then, twice, as 12 of 80
RATE = 8e-4  # of transformers: of 3e-4, 8e-4 and 1.5e-3 the one that was furthest after 400 steps of 12 layers
SOLVED = 0.9  # running accuracy from which a length counts as solved
QUICK = {"max_length": 2, "d_model": 16, "d_state": 4, "batch_size": 8, "steps": 4, "warmup_steps": 1, "decay_steps": 1,
         "log_every": 2, "save_every": 4}  # fmt: skip


def runs(quick: bool = False) -> Iterator[tuple[str, Settings]]:
    """Every run by name: of the loss, to length 6; of depth and width, to length 12, of the depth to 16 too."""
    shared: dict[str, Any] = {"save_every": 250, "log_every": 50} | (QUICK if quick else {})
    for seed in SEEDS[: 1 if quick else None]:
        for n_layer in (2, 6):
            for loss in ("weighted", "reasoning", "all"):
                name = f"loss {loss}, {n_layer} layers, seed {seed}"
                yield name, Settings(**{**LOSS, **shared, "n_layer": n_layer, "loss": loss, "seed": seed})
    kinds = (("mamba", "arithmetic", DEPTHS), ("mamba", "s5", DEPTHS), ("transformer", "arithmetic", DEPTHS[::2]))
    for seed in SEEDS[: 1 if quick else 2]:
        for architecture, acts, depths in kinds:
            for n_layer in depths[: 1 if quick else None]:
                made: dict[str, Any] = {"n_layer": n_layer, "acts": acts, "architecture": architecture, "seed": seed}
                made |= {"learning_rate": RATE} if architecture == "transformer" else {}
                name = f"depth {architecture}, {acts}, {n_layer} layers, seed {seed}"
                yield name, Settings(**{**DEPTH, **shared, **made})
        name = f"reach mamba, arithmetic, {DEPTHS[-1]} layers, seed {seed}"
        yield name, Settings(**{**REACH, **shared, "n_layer": DEPTHS[-1], "seed": seed})
        for n_layer, d_model in WIDTHS[: 1 if quick else None]:
            settings = Settings(**{**DEPTH, "d_model": d_model, **shared, "n_layer": n_layer, "seed": seed})
            yield f"width mamba, arithmetic, {n_layer} layers, d_model {settings.d_model}, seed {seed}", settings


def train_all(results: Results, folder: Path, *, quick: bool = False) -> None:
    """Train what is not in the results yet.

    Args:
        folder: where the runs are; one that was stopped goes on.
    """
    from ..training.train import train  # transformers takes seconds to import

    for name, settings in runs(quick):
        place = folder / name.replace(", ", "-").replace(" ", "-")

        def one(settings: Settings = settings, place: Path = place) -> dict[str, Any]:
            train(settings, place, resume=(place / "settings.json").exists())
            return summary(settings, place)

        results.part(name, one)


def summary(settings: Settings, place: Path) -> dict[str, Any]:
    """What is kept of a run: its settings that differ, and of its log step, seconds, loss and accuracies by length."""
    log = [json.loads(line) for line in (place / "train_log.jsonl").read_text().splitlines()]
    rows = [{k: row[k] for k in ("step", "seconds", "loss", "accuracy")} for row in log]
    return {
        "n_layer": settings.n_layer,
        "d_model": settings.d_model,
        "loss": settings.loss,
        "acts": settings.acts,
        "architecture": settings.architecture,
        "seed": settings.seed,
        "log": rows,
        "solved_at": next((r["step"] for r in rows if min(r["accuracy"]) >= SOLVED), None),
        "longest": max((i for i, a in enumerate(rows[-1]["accuracy"], 1) if a >= SOLVED), default=0),
    }


def sizes(parts: Read) -> dict[tuple[int, int, int], list[int]]:
    """(parameters, layers, d_model) -> the longest length of each seed: Mambas, arithmetic, trained to length 12."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for name, part in parts.items():
        if name.startswith(("depth mamba, arithmetic", "width mamba, arithmetic")):
            s = Settings(n_layer=part["n_layer"], d_model=part.get("d_model", Settings.d_model))
            count = sum(p.numel() for p in Mamba(s.mamba(s.task.tokenizer.vocab_size)).parameters())
            found.setdefault((count, s.n_layer, s.d_model), []).append(part["longest"])
    return dict(sorted(found.items()))
