"""The demo: the SSM state patched over all layers and positions, in pairs of prompts that differ in one operation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp import Grid, Set, accuracy, at, heatmap, logit_diff, patch_grid, run
from minimal_mamba import Mamba
from minimal_mamba.files import write_json
from minimal_mamba.provenance import provenance

from ..drawing.style import BLUE, COLUMN, ORANGE, SKY, figure_file
from ..task import MASKED, Pairs, pairs
from .patching import STREAM, words


@dataclass(frozen=True)
class StatePatching:
    """The sweep of a model.

    Args:
        words: of each position; the operation that differs is starred.
        grid: `ssm_state` patched layer by layer, and in all layers at once.
        conv: `conv_state` patched in all layers. ceiling: both, the whole memory, in all layers.
        correct: share of base and donor prompts that the model answers right.
    """

    pairs: Pairs
    words: tuple[str, ...]
    grid: Grid
    conv: Grid
    ceiling: Grid
    backend: str
    correct: tuple[float, float]

    @property
    def echo(self) -> int:
        """The position of the last word that differs: from there on the pair's words are the same."""
        return int(self.pairs.positions[0, 1])


def sweep(
    model: Mamba, *, num_steps: int = 6, which_step: int = 1, n: int = 200, seed: int = 0, progress: bool = True
) -> StatePatching:
    """Patch every layer and position, and all layers at once, on n pairs that differ in one operation.

    Args:
        num_steps: operations of every prompt. which_step: the one that differs, from 0.
    Returns:
        StatePatching; the metric is logit(donor's answer) - logit(base's answer), in nats.
    Cost: positions * (layers + 3) forwards of n rows.
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
    grid = patch("ssm_state", [*layers, everything])
    conv, ceiling = patch("conv_state", [everything]), patch("recurrent_state", [everything])
    return StatePatching(drawn, words(MASKED, num_steps, which_step), grid, conv, ceiling, base.backend, right)


@torch.no_grad()
def flips(model: Mamba, drawn: Pairs, site: str, layers: Sequence[int], pos: int) -> float:
    """Share of answers that become the donor's when a site of these layers is patched at a position."""
    places = [getattr(at, site)(layer=layer, pos=pos) for layer in layers]
    donor = run(model, drawn.donor_ids, record=places)
    out = run(model, drawn.base_ids, edits=[Set(a, donor[a]) for a in places], last_only=True)
    return accuracy(out, drawn.donor_answer).mean().item()


def summary(model: Mamba, found: StatePatching) -> dict[str, Any]:
    """The numbers that the report and the results file are made of; a share is of the gap between base and donor."""
    n_layer, end = model.config.n_layer, len(found.words) - 1
    every = tuple(range(n_layer))

    def cell(grid: Grid, row: int, pos: int, layers: tuple[int, ...]) -> dict[str, Any]:
        return {
            "site": grid.site,
            "layers": list(layers),
            "position": pos,
            "word": found.words[pos],
            "share": grid.recovered()[row, pos].item(),
            "standard_error": grid.recovered_error()[row, pos].item(),
            "flipped": flips(model, found.pairs, grid.site, layers, pos),
        }

    single = found.grid.recovered()[:n_layer]
    strongest = [int(single[:, pos].argmax()) for pos in range(end + 1)]
    between = range(found.echo, end)  # once the pair's words agree again, and before the last word is taken in
    early = max(between, key=lambda pos: single[:, pos].max().item())
    high = max(between, key=lambda pos: found.grid.recovered()[n_layer, pos].item())
    low = min(between, key=lambda pos: found.grid.recovered()[n_layer, pos].item())
    return {
        "pairs": len(found.pairs.base_ids),
        "num_steps": found.pairs.base_values.shape[1],
        "differing_step": int(found.pairs.which_step[0]) + 1,
        "answered_right": {"base": found.correct[0], "donor": found.correct[1]},
        "gap_nats": (found.grid.donor - found.grid.base).mean().item(),
        "whole_memory_least": found.ceiling.recovered()[0, found.echo : end].min().item(),
        "state_all_layers_most": cell(found.grid, n_layer, high, every),
        "state_all_layers_least": cell(found.grid, n_layer, low, every),
        "conv_all_layers_there": cell(found.conv, 0, low, every),
        "best_layer_before_end": cell(found.grid, strongest[early], early, (strongest[early],)),
        "best_layer_at_end": cell(found.grid, strongest[end], end, (strongest[end],)),
        "strongest_layer_by_position": strongest,
    }


def sentences(numbers: dict[str, Any]) -> list[str]:
    """What the sweep shows, in three sentences."""
    most, least, conv = (
        numbers[k] for k in ("state_all_layers_most", "state_all_layers_least", "conv_all_layers_there")
    )
    before, last = numbers["best_layer_before_end"], numbers["best_layer_at_end"]

    def share(cell: dict[str, Any]) -> str:
        return f"{cell['share']:.2f} ± {2 * cell['standard_error']:.2f}"

    def place(cell: dict[str, Any]) -> str:
        return f"after '{cell['word']}' (position {cell['position']})"

    right, gap = numbers["answered_right"], numbers["gap_nats"]
    return [
        f"In {numbers['pairs']} pairs of hidden prompts of {numbers['num_steps']} steps that differ only in operation "
        f"{numbers['differing_step']} (the model answers {right['base']:.1%} and {right['donor']:.1%} of them right, "
        f"{gap:.1f} nats apart), the memory of all layers carries the value that no word shows: handed over anywhere "
        f"from the differing word's echo to the last word but one, SSM state and conv state together move the answer "
        f"{numbers['whole_memory_least']:.2f} of the way to the donor's (0 is the base run, 1 the donor).",
        f"The SSM state of all layers alone moves it between {share(least)} {place(least)}, where the conv state alone "
        f"moves it {share(conv)}, and {share(most)} {place(most)}, where {most['flipped']:.0%} of the answers flip "
        f"(± 2 standard errors): much of the value travels in the conv's short memory.",
        f"It moves through the layers, too: before the last word the strongest single layer is {before['layers'][0]} "
        f"{place(before)} with {share(before)} ({before['flipped']:.0%} flipped), at the last word layer "
        f"{last['layers'][0]} with {share(last)} ({last['flipped']:.0%} flipped).",
    ]


def write(folder: Path, model: Mamba, found: StatePatching, command: str, seed: int) -> list[str]:
    """Write results.json and the figures to a folder; returns the sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = summary(model, found)
    grids = (found.grid, found.conv, found.ceiling)
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


def draw(folder: Path, found: StatePatching) -> None:
    """The two figures, as PNG and PDF: a heat map, and the shares by position with their uncertainty."""
    import matplotlib

    matplotlib.use("Agg")

    layers = len(found.grid.layers) - 1
    with figure_file(folder / "state_patching") as new:
        top, bottom = new(2, 1, figsize=(COLUMN, 1.4 + 0.12 * layers), height_ratios=[layers + 1, 2], sharex=True)
        heatmap(found.grid, ax=top, tokens=found.words, title="Patching the SSM state", limit=1.0)
        values = torch.cat([found.conv.values, found.ceiling.values])
        both = replace(found.conv, values=values, layers=found.conv.layers + found.ceiling.layers)
        labels = ["conv", "state+conv"]
        heatmap(both, ax=bottom, tokens=found.words, rows=labels, limit=1.0, colorbar=False)
        top.set_xlabel("")
        top.tick_params(labelbottom=False)
        bottom.set_ylabel("all layers")
        bottom.set_xlabel("word after which the donor's value is put in")

    with figure_file(folder / "state_patching_by_word") as new:
        ax = new(figsize=(COLUMN, 2.4))
        x = range(len(found.words))

        def curve(share: Tensor, error: Tensor, label: str, colour: str, mark: str, line: str = "-") -> None:
            ax.fill_between(x, share - 2 * error, share + 2 * error, color=colour, alpha=0.2, lw=0)
            ax.plot(x, share, color=colour, marker=mark, ms=2.5, ls=line, label=label)

        share, error = found.grid.recovered(), found.grid.recovered_error()
        best = share[:layers].argmax(0)
        curve(share[best, x], error[best, x], "SSM state, best single layer", SKY, "o")
        curve(share[-1], error[-1], "SSM state, all layers", BLUE, "s")
        for grid, label, colour, mark in ((found.conv, "conv state", ORANGE, "^"), (found.ceiling, "both", "0.3", "")):
            curve(grid.recovered()[0], grid.recovered_error()[0], f"{label}, all layers", colour, mark, "--")
        for position in found.pairs.positions[0].tolist():
            ax.axvline(position, color="0.87", lw=4, zorder=0)
        ax.axhline(0, color="0.6", lw=0.5)
        ax.set_xticks(x, found.words, rotation=90)
        ax.set_xlabel("word after which it is patched (grey: the pair differs)")
        ax.set_ylabel("answer moved (0 base, 1 donor)")
        ax.legend(loc="upper left")
