"""The demo: both memories patched over all layers and positions, in pairs of prompts that differ in one operation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp import Grid, accuracy, heatmap, logit_diff, patch_grid, run
from minimal_mamba import Mamba
from minimal_mamba.files import write_json
from minimal_mamba.provenance import provenance

from ..drawing.style import BLUE, COLUMN, ORANGE, RED, SKY, figure_file
from ..task import MASKED, Pairs, pairs
from .patching import STREAM, words


@dataclass(frozen=True)
class Memories:
    """The sweep of a model.

    Args:
        words: of each position; the operation that differs is starred.
        state, conv: `ssm_state` and `conv_state` patched layer by layer, and in all layers at once.
        ceiling: both, the whole memory, in all layers.
        correct: share of base and donor prompts that the model answers right.
    """

    pairs: Pairs
    words: tuple[str, ...]
    state: Grid
    conv: Grid
    ceiling: Grid
    backend: str
    correct: tuple[float, float]

    @property
    def echo(self) -> int:
        """The position of the last word that differs: from there on the pair's words are the same."""
        return int(self.pairs.positions[0, 1])


def sweep(
    model: Mamba, *, num_steps: int = 6, which_step: int = 1, n: int = 100, seed: int = 0, progress: bool = True
) -> Memories:
    """Patch both memories in every layer and position, and in all layers, on n pairs that differ in one operation.

    Args:
        num_steps: operations of every prompt. which_step: the one that differs, from 0.
    Returns:
        Memories; the metric is logit(donor's answer) - logit(base's answer), in nats.
    Cost: positions * (2 layers + 3) forwards of n rows, of which the sweeps spare more than half.
    """
    drawn = pairs(num_steps, n, [STREAM, seed], which_step=which_step)
    layers: list[int | Sequence[int]] = list(range(model.config.n_layer))
    everything = tuple(range(model.config.n_layer))

    def metric(logits: Tensor) -> Tensor:
        return logit_diff(logits, drawn.donor_answer, drawn.base_answer)

    def patch(site: str, rows: list[int | Sequence[int]]) -> Grid:
        return patch_grid(
            model, drawn.base_ids, drawn.donor_ids, site=site, metric=metric, layers=rows, progress=progress
        )

    with torch.no_grad():
        base, donor = run(model, drawn.base_ids, last_only=True), run(model, drawn.donor_ids, last_only=True)
    right = (accuracy(base, drawn.base_answer).mean().item(), accuracy(donor, drawn.donor_answer).mean().item())
    state, conv = patch("ssm_state", [*layers, everything]), patch("conv_state", [*layers, everything])
    ceiling = patch("recurrent_state", [everything])
    return Memories(drawn, words(MASKED, num_steps, which_step), state, conv, ceiling, base.backend, right)


def summary(model: Mamba, found: Memories) -> dict[str, Any]:
    """The numbers that the report and the results file are made of; a share is of the gap between base and donor."""
    n_layer, end = model.config.n_layer, len(found.words) - 1

    def cell(grid: Grid, row: int, pos: int) -> dict[str, Any]:
        return {
            "site": grid.site,
            "layer": "all" if row == len(grid.layers) - 1 else row,
            "position": pos,
            "word": found.words[pos],
            "share": grid.recovered()[row, pos].item(),
            "standard_error": grid.recovered_error()[row, pos].item(),
        }

    between = range(found.echo, end)  # once the pair's words agree again, and before the last word is taken in
    state, conv = found.state.recovered(), found.conv.recovered()
    return {
        "pairs": len(found.pairs.base_ids),
        "num_steps": found.pairs.base_values.shape[1],
        "differing_step": int(found.pairs.which_step[0]) + 1,
        "answered_right": {"base": found.correct[0], "donor": found.correct[1]},
        "gap_nats": (found.state.donor - found.state.base).mean().item(),
        "whole_memory_least": found.ceiling.recovered()[0, found.echo : end].min().item(),
        "state_most": cell(found.state, n_layer, max(between, key=lambda pos: state[n_layer, pos].abs().item())),
        "conv_least": cell(found.conv, n_layer, min(between, key=lambda pos: conv[n_layer, pos].item())),
        "strongest": [
            cell(found.conv, int(conv[:n_layer, pos].argmax()), pos) for pos in between if found.words[pos][:2] == "op"
        ],
    }


KNOWS = 0.9  # right answers without which nothing is said of where a value is


def sentences(numbers: dict[str, Any]) -> list[str]:
    """What the sweep shows, in three sentences."""

    def share(cell: dict[str, Any]) -> str:
        return f"{cell['share']:.2f} ± {2 * cell['standard_error']:.2f}"

    right, gap, most, least = (numbers[k] for k in ("answered_right", "gap_nats", "state_most", "conv_least"))
    climb = ", ".join(f"{c['layer']} after '{c['word']}' ({share(c)})" for c in numbers["strongest"])
    knows = min(right.values()) >= KNOWS
    opening = (
        f"In {numbers['pairs']} pairs of hidden prompts of {numbers['num_steps']} steps that differ only in operation "
        f"{numbers['differing_step']} (the model answers {right['base']:.1%} and {right['donor']:.1%} of them right, "
        f"{gap:.1f} nats apart), "
    )
    alone = (
        f"the conv state of all layers alone moves the answer {share(least)} of the way to the donor's where it does "
        f"least (after '{least['word']}', position {least['position']}), the SSM state of all layers alone "
        f"{share(most)} where it does most (after '{most['word']}', position {most['position']}; 0 is the base run, 1 "
        "the donor, ± 2 standard errors)"
    )
    return [
        f"{opening}{alone}: so the value that no word shows is carried by the "
        f"{'conv' if least['share'] > abs(most['share']) else 'SSM'} states."
        if knows
        else f"{opening}which is too few to say where it keeps a value; of what it answers, {alone}.",
        f"The layer in which the conv state alone does most is layer {climb}.",
        "A check of the toolkit: both memories of all layers together are the donor's run from there on, whatever the "
        f"model, and move the answer {numbers['whole_memory_least']:.2f} of the way.",
    ]


def write(folder: Path, model: Mamba, found: Memories, command: str, seed: int) -> list[str]:
    """Write results.json and the figures to a folder; returns the sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = summary(model, found)
    grids = (found.state, found.conv, found.ceiling)
    result = {
        "summary": numbers,
        "sentences": sentences(numbers),
        "words": found.words,
        "layers": {g.site: g.layers for g in grids},
        "share": {g.site: g.recovered().tolist() for g in grids},
        "standard_error": {g.site: g.recovered_error().tolist() for g in grids},
        "provenance": provenance(command=command, seed=seed, backend=found.backend),
    }
    write_json(folder / "results.json", result)
    draw(folder, found)
    return sentences(numbers)


def draw(folder: Path, found: Memories) -> None:
    """The two figures, as PNG and PDF: heat maps of both memories, and the shares by word with their uncertainty."""
    import matplotlib

    matplotlib.use("Agg")

    layers = len(found.state.layers) - 1
    with figure_file(folder / "memories_patched") as new:
        axes = new(3, 1, figsize=(COLUMN, 1.9 + 0.17 * layers), height_ratios=[layers, layers, 3], sharex=True)
        for ax, grid, name in ((axes[0], found.state, "SSM state"), (axes[1], found.conv, "conv state")):
            alone = replace(grid, values=grid.values[:layers], layers=grid.layers[:layers])
            heatmap(alone, ax=ax, tokens=found.words, title=f"{name} of one layer put in", limit=1.0)
        values = torch.cat([found.state.values[layers:], found.conv.values[layers:], found.ceiling.values])
        three = replace(found.ceiling, values=values, layers=3 * found.ceiling.layers)
        heatmap(three, ax=axes[2], tokens=found.words, rows=["SSM", "conv", "both"], limit=1.0, colorbar=False,
                title="memory of all layers put in")  # fmt: skip
        for ax in axes[:2]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
        axes[2].set_ylabel("")
        axes[2].set_xlabel("word after which the donor's memory is put in")

    with figure_file(folder / "memories_by_word") as new:
        ax = new(figsize=(COLUMN, 2.4))
        x = range(len(found.words))

        def curve(share: Tensor, error: Tensor, label: str, colour: str, mark: str, line: str = "-") -> None:
            ax.fill_between(x, share - 2 * error, share + 2 * error, color=colour, alpha=0.2, lw=0)
            ax.plot(x, share, color=colour, marker=mark, ms=2.5, ls=line, label=label)

        memories = ((found.state, "SSM state", (SKY, BLUE)), (found.conv, "conv state", (ORANGE, RED)))
        for grid, name, colours in memories:
            share, error = grid.recovered(), grid.recovered_error()
            best = share[:layers].argmax(0)
            curve(share[best, x], error[best, x], f"{name}, best single layer", colours[0], "o")
            curve(share[-1], error[-1], f"{name}, all layers", colours[1], "s")
        curve(found.ceiling.recovered()[0], found.ceiling.recovered_error()[0], "both, all layers", "0.3", "", "--")
        for position in found.pairs.positions[0].tolist():
            ax.axvline(position, color="0.87", lw=4, zorder=0)
        ax.axhline(0, color="0.6", lw=0.5)
        ax.set_xticks(x, found.words, rotation=90)
        ax.set_xlabel("word after which it is put in (grey: the pair differs)")
        ax.set_ylabel("answer moved (0 base, 1 donor)")
        ax.legend(loc="upper left")
