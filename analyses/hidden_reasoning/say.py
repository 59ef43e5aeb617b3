"""What is read off the results in one number or phrase, for the tables and sentences of `findings`."""

import numpy as np

from .drawing.probes import layers_of
from .experiments.accuracy import Score, wilson
from .experiments.results import Read


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def beside(columns: dict[str, dict[str, str]], lines: str = "") -> str:
    """A Markdown table with a column each, and a row for each line that one of them has; `lines` stands above these."""
    said = dict.fromkeys(line for column in columns.values() for line in column)
    return table([lines, *columns], [[line, *(column.get(line, "-") for column in columns.values())] for line in said])


def percent(found: Score) -> str:
    """A share and its 95 % interval; alone where every prompt was asked."""
    low, high = found.interval()
    return f"{found.share:.1%}" if found.every else f"{found.share:.1%} ({low:.1%} .. {high:.1%})"


# the controls of a swap, and what a table calls them
SWAPS = {"varying": "within what varies most", "random": "at random", "shuffled": "found for shuffled answers"}


def swapped(one: Read) -> str:
    """The share of swaps that gave the target, and its 95 % interval."""
    return percent(Score(one["of"], one["right"], None, False))


def few(share: float, n: int) -> str:
    """A small share of n, and the upper end of its 95 % interval."""
    return f"{share:.1%} of {n} (up to {wilson(round(share * n), n)[1]:.1%})"


def between(found: Read) -> list[int]:
    """Positions from the differing word's echo, where the pair's words agree again, to the last but one."""
    return list(range(found["value: pairs"]["differ_at"][-1], len(found["value: pairs"]["words"]) - 1))


def operations(found: Read) -> list[int]:
    """Of those the ones whose word is an operation."""
    return [p for p in between(found) if found["value: pairs"]["words"][p].startswith("op")]


def ends(found: Read, site: str, positions: list[int]) -> str:
    """Least and most share of the row of all layers."""
    row = np.array(found[site]["share"])[-1, positions]
    low, high = (f"{x.round(2) + 0.0:.2f}" for x in (row.min(), row.max()))  # no minus before a zero
    return low if low == high else f"{low} to {high}"


def peaks(found: Read, site: str) -> str:
    """The layer that does most alone, after each operation."""
    share, words = np.array(found[site]["share"])[:-1], found["value: pairs"]["words"]
    peaks = [(words[p].strip("*"), share[:, p].argmax(), share[:, p].max()) for p in operations(found)]
    return ", ".join(f"{word} {layer} ({most:.2f})" for word, layer, most in peaks)


def without(found: Read) -> dict[str, dict[str, Score]]:
    """Answers and echoes that are right when one of the memories does nothing."""
    return {k: {name: Score(**one) for name, one in v.items()} for k, v in found["without"].items()}


def control(found: Read, *sites: str) -> str:
    """The largest share of answers that change where the pair's values agree."""
    flips = max(np.array(found[f"control: {site}"]["flip"]).max() for site in sites)
    return few(flips, found["control: pairs"]["pairs"])


def first_read(probes: Read, site: str) -> str:
    """The first layer from which the value of each step is read, in nine of ten held-out prompts."""
    layers = layers_of(probes, site)
    scored = np.array([probes[f"{site}, layer {i}"]["value"]["score"] for i in layers])
    return ", ".join(str(layers[int(good.argmax())]) if good.any() else "none" for good in (scored >= 0.9).T)


def erased(probes: Read) -> tuple[list[Read], list[float], list[float]]:
    """Of each layer, what was erased after it, the answers that stay right, and those with shuffled labels' spaces."""
    found = [probes[f"erase value, layer {i}"] for i in layers_of(probes, "resid_post")]
    stays = [float(np.mean([control["answer"] for control in one["controls"]])) for one in found]
    return found, [one["space"]["answer"] for one in found], stays


def best(probes: Read, site: str, label: str, step: int) -> float:
    """Of the best layer, the score of a label at a step, counted from 0."""
    return max(probes[f"{site}, layer {i}"][label]["score"][step] or 0 for i in layers_of(probes, site))


def means(rows: list[Read]) -> tuple[int, int, str]:
    """The step at which fewest answers follow a value whose mean memory is put in, how many, and of how many."""
    worst = min(rows, key=lambda r: r["mean"]["right"])
    low, high = worst["mean"]["interval"]
    return worst["step"], worst["mean"]["right"], f"{worst['mean']['of']} ({low:.1%} .. {high:.1%})"


def untrained(probes: Read, site: str, label: str, step: int) -> float:
    """The same in a model that was never trained."""
    return max(probes[f"{site}, layer {i}"][label]["random"][step] or 0 for i in layers_of(probes, site))


def handed(rows: list[Read]) -> tuple[Read, str]:
    """The step at which the running value does worst, and how."""
    worst = min(rows, key=lambda r: r["running value"]["alone"] / r["running value"]["of"])
    value = worst["running value"]
    low, high = value["interval"]
    return worst, f"{value['alone']} of {value['of']} cases ({low:.1%} .. {high:.1%})"


def worst(cases: list[tuple[int, int]]) -> str:
    """How many cases, of how many, where they are fewest; and in all other places together."""
    worst = min(cases, key=lambda one: one[0] / one[1])
    right, of = (sum(counts) - one for counts, one in zip(zip(*cases, strict=True), worst, strict=True))
    return f"{worst[0]:,} of {worst[1]:,} at worst; {right:,} of {of:,} elsewhere"


def listed(shares: list[float]) -> str:
    """Shares as whole per cents."""
    return ", ".join(f"{x:.0%}" for x in shares)


def bullets(*lines: str) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
