"""What the results say in numbers: tables and sentences, made from the results files and put into the study's page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..pages import placed
from .drawing.probes import layers_of
from .drawing.trainings import GROUPS, LOSSES, scores
from .experiments.accuracy import Score, wilson
from .experiments.results import Read, read
from .organism import MODELS

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def percent(found: Score) -> str:
    """A share and its 95 % interval."""
    low, high = found.interval()
    return f"{found.share:.1%} ({low:.1%} .. {high:.1%})"


def part(name: str) -> Read:
    """The parts of a results file that ships."""
    kept: Read = read(RESULTS / f"{name}.json", name.split("-")[0])["parts"]
    return kept


def _options(command: str) -> str:
    """What a command of `train` says but for the folder."""
    return re.sub(r".* train| --out \S+", "", command)


def models() -> str:
    """What ships."""
    rows = []
    for name in ("masked", "doublethink", "transformer", "state_only", "shallow"):
        recipe = json.loads((MODELS / name / "recipe.json").read_text())
        s = recipe["settings"]
        rows.append(
            [
                f"`{name}`",
                f"{s['n_layer']} layers, d_model {s['d_model']}, {recipe['parameters']:,} parameters",
                str(s["max_length"]),
                f"{recipe['steps']:,} steps, {recipe['seconds'] / 60:.0f} minutes",
                f"`train{_options(recipe['command'])}`",
            ]
        )
    return table(["model", "size", "to length", "training, one core", "command"], rows)


def accuracy() -> str:
    """Exact final answers by length."""
    columns = {
        "masked": scores(part("evaluate-masked")),
        "masked, values written": scores(part("evaluate-masked"), "shown"),
        "state_only": scores(part("evaluate-state_only")),
        "transformer": scores(part("evaluate-transformer")),
        "doublethink": scores(part("evaluate-doublethink")),
    }
    bounds = part("shortcuts-masked-arithmetic")["bounds"]
    best = {n: max(b.get(str(n), 0) for b in bounds.values()) for n in columns["masked"]}
    rows = [
        [str(n), *(percent(c[n]) for c in columns.values()), f"{best[n]:.0%}"] for n in (4, 6, 8, 10, 11, 12, 13, 14)
    ]
    return table(["operations", *columns, "best shortcut"], rows)


def shortcuts() -> str:
    """What the best functions of less than the whole prompt reach."""
    found = {acts: part(f"shortcuts-masked-{acts}")["bounds"] for acts in ("arithmetic", "s5")}
    rows = [
        [said, *(f"{found[acts][name][str(n)]:.1%}" for acts in found for n in (6, 12))]
        for name, said in (
            ("multiset", "which operations, in any order"),
            ("last 4", "the last 4 operations"),
            ("last 1", "the last operation"),
            ("length", "the length alone"),
        )
    ]
    size = "quotient of size 4"
    rows.append(
        ["product of the multipliers", *(f"{found['arithmetic'][size][str(n)]:.1%}" for n in (6, 12)), "-", "-"]
    )
    return table(["best function of", "arithmetic, 6", "arithmetic, 12", "S5, 6", "S5, 12"], rows)


def losses() -> str:
    """Steps until all of lengths 1 to 6 are solved, by loss and depth."""
    found = part("curves-all")
    rows = []
    for loss, (label, _) in LOSSES.items():
        row = [label]
        for n in (2, 6):
            runs = [v for k, v in found.items() if k.startswith(f"loss {loss}, {n} layers")]
            row.append(", ".join("never" if r["solved_at"] is None else f"{r['solved_at']:,}" for r in runs))
            row.append(", ".join(str(r["longest"]) for r in runs))
        rows.append(row)
    return table(["loss", "2 layers: solved at step", "longest", "6 layers: solved at step", "longest"], rows)


def depth() -> str:
    """The longest length that is solved, by depth."""
    found = {k: v for k, v in part("curves-all").items() if k.startswith("depth")}
    depths = sorted({v["n_layer"] for v in found.values()})
    rows = []
    for (architecture, acts), (label, *_) in GROUPS.items():
        mine = [v for v in found.values() if (v["architecture"], v["acts"]) == (architecture, acts)]
        if mine:
            cells = [[str(v["longest"]) for v in mine if v["n_layer"] == n] for n in depths]
            rows.append([label, *(", ".join(c) or "-" for c in cells)])
    return table(["longest length solved, each seed", *(f"{n} layers" for n in depths)], rows)


def _between(found: Read, kind: str = "value") -> list[int]:
    """Positions from the differing word's echo, where the pair's words agree again, to the last but one."""
    return list(range(found[f"{kind}: pairs"]["differ_at"][-1], len(found[f"{kind}: pairs"]["words"]) - 1))


def _ends(found: Read, site: str, positions: list[int]) -> str:
    """Least and most share of the row of all layers."""
    row = np.array(found[site]["share"])[-1, positions]
    low, high = (f"{abs(x):.2f}" for x in (row.min().round(2), row.max()))
    return low if low == high else f"{low} to {high}"


def where() -> str:
    """Where the running value is, in the model `masked`."""
    found, probes = part("patch-masked"), part("probe-masked")
    pairs, between = found["value: pairs"], _between(found)
    state, conv = (_ends(found, f"value: {site}", between) for site in ("ssm_state", "conv_state"))
    control = max(np.array(found[f"control: {s}"]["flip"]).max() for s in ("ssm_state", "conv_state", "resid_post"))
    single = np.array(found["value: conv_state"]["share"])[:-1]
    steps = [p for p in between if pairs["words"][p].startswith("op")]
    climb = ", ".join(f"{pairs['words'][p].strip('*')} {single[:, p].argmax()}" for p in steps)
    sets = found["windows: recurrent_state"]
    three = np.array(sets["share"])[[i for i, r in enumerate(sets["layers"]) if np.size(r) == 3]].max(0)
    accounts = [r for r in found["handover"]["recurrent_state"] if r["word"] == "after"]
    value = [sum(r["running value"][k] for r in accounts) for k in ("alone", "of")]
    others = {n: [sum(r[n][k] for r in accounts) for k in ("alone", "of")] for n in ("partial sum", "done", "base")}
    none = {k: Score(**v) for k, v in found["without"].items()}
    needed = {s: np.array(found[f"needed: {s}"]["right"]) for s in ("ssm_state", "conv_state")}
    read_ssm = [max(probes[f"ssm_state, layer {i}"]["value"]["score"][j] for i in layers_of(probes, "ssm_state"))
                for j in range(len(probes["steps"]))]  # fmt: skip
    answer = max(probes[f"resid_post, layer {i}"]["answer"]["score"][5] for i in layers_of(probes, "resid_post"))
    erased = [probes[f"erase value, layer {i}"] for i in range(12)]
    spaces = [[e[kind]["answer"] for e in erased[:9]] for kind in ("space", "control")]
    return "\n".join(
        f"- {line}"
        for line in (
            f"**Full hand-over.** In {pairs['pairs']} pairs of prompts of {found['handover']['num_steps']} steps "
            f"that differ in operation 2 ({pairs['gap_nats']:.1f} nats apart), the donor's conv state of all layers "
            f"moves the answer {conv} of the way at every word from the echo on; the SSM state of all layers {state}.",
            "**Control.** Where the other operation leads to the same value, patching any site at any place changes "
            f"{control:.1%} of the answers.",
            "**Layer by layer.** The layer whose conv state alone moves the answer most climbs with the steps: "
            f"{climb}; alone it moves it {single[:, steps].max(0).min():.2f} to {single[:, steps].max(0).max():.2f}. "
            f"Three neighbouring layers together move it up to {three[0]:.2f} after operation 2, and {three[-1]:.2f} "
            "near the end.",
            "**What is handed over.** Between unrelated prompts, the whole memory carries the *running value*: the "
            f"answer is what the base's remaining operations make of it in {value[0]} of {value[1]} cases in which "
            f"no other account foretells the same ({wilson(*value)[0]:.1%} at least); the donor's final answer in "
            f"{others['done'][0]} of {others['done'][1]}, the partial sum in {others['partial sum'][0]} of "
            f"{others['partial sum'][1]}, the base's own in {others['base'][0]} of {others['base'][1]}.",
            "**Necessity.** With no token reading any SSM state, in all layers at once (y = D u), "
            f"{percent(none['SSM state'])} of {none['SSM state'].prompts} answers stay right; with every conv state "
            f"at its mean {percent(none['conv state'])}. A mean in all layers at one word leaves "
            f"{needed['ssm_state'][-1].min():.0%} (SSM state) and down to {needed['conv_state'][-1].min():.0%} (conv "
            f"state) right; in one layer alone never fewer than {needed['conv_state'][:-1].min():.1%}.",
            "**Probes mislead.** From the SSM state, of which the answers need nothing, a linear probe reads the "
            f"running value at every step, at the worst {min(read_ssm):.1%} of it. From the residual stream it reads "
            "the value at every step from the layer on to which it has climbed, and two steps before the end the "
            f"final answer at {answer:.0%}, which is chance.",
            f"**Erasure.** The {erased[0]['dimensions']} dimensions in which the value's class means differ, "
            f"projected out of the residual stream after any of layers 0 to 8, leave {min(spaces[0]):.0%} to "
            f"{max(spaces[0]):.0%} right, a random space of as many {min(spaces[1]):.0%}.",
        )
    )


def shifted() -> str:
    """Hand-overs from one step to another, by how many layers the value would have climbed at the end."""
    found = part("patch-masked")["handover"]
    n = found["num_steps"]
    by: dict[int, list[int]] = {}
    for r in found["shifted"]:
        count = by.setdefault(r["from"] + n - r["to"], [0, 0])
        count[0] += r["right"]
        count[1] += r["of"]
    accuracies = scores(part("evaluate-masked"))
    rows = [
        [str(k), f"{right / of:.1%}", f"{accuracies[k].share:.1%}" if k > n else "-"]
        for k, (right, of) in sorted(by.items())
        if k >= 4
    ]
    return table(["donor's step + steps to come", "donor's value taken up", "answers right at that length"], rows)


def overt() -> str:
    """Hidden and overt value, in the model `doublethink`."""
    found = part("patch-doublethink")
    between = _between(found)
    pairs = found["value: pairs"]
    conv, state = (_ends(found, f"value: {s}", between[:-1]) for s in ("conv_state", "ssm_state"))
    cross = max(np.array(found[f"overt: {s}"]["flip"]).max() for s in ("recurrent_state", "resid_post"))
    back = max(np.array(found[f"value, next overt: {s}"]["flip"]).max() for s in ("recurrent_state", "resid_post"))
    shown = found["overt, next overt: conv_state"]
    best = np.array(shown["share"])[:-1].mean(1)
    r = {s: [found[f"channels: {s}, {k} after"]["correlation"] for k in (1, 2)] for s in ("ssm_state", "conv_state")}
    none = {k: Score(**v) for k, v in found["without"].items()}
    return "\n".join(
        f"- {line}"
        for line in (
            f"In {pairs['pairs']} pairs whose hidden value differs and whose text shows the same, the conv state of "
            f"all layers moves the answer {conv} of the way, the SSM state {state}.",
            f"Patching the hidden value, in any layer and at any word, changes at most {back:.1%} of the next overt "
            f"values; patching the overt value {cross:.1%} of the final answers.",
            "The overt value is read again from the text at every step: the conv state that moves it most, at every "
            f"word the same, is that of layer {best.argmax()}; the hidden value's climbs from layer to layer as in "
            "`masked`.",
            "Over groups of ten channels of all layers, what a group carries of the one and of the other is "
            f"uncorrelated: r = {min(r['conv_state']):.2f} and {max(r['conv_state']):.2f} one and two words on (conv "
            f"state), {min(r['ssm_state']):.2f} and {max(r['ssm_state']):.2f} (SSM state).",
            f"With no token reading any SSM state {percent(none['SSM state'])} of the final answers stay right.",
        )
    )


def alone() -> str:
    """The model that has no conv's memory."""
    found, probes = part("patch-state_only"), part("probe-state_only")
    between = _between(found)
    state = _ends(found, "value: ssm_state", between)
    single = np.array(found["value: ssm_state"]["share"])[:-1]
    words = found["value: pairs"]["words"]
    steps = [p for p in between if words[p].startswith("op")]
    climb = ", ".join(f"{words[p].strip('*')} {single[:, p].argmax()} ({single[:, p].max():.2f})" for p in steps)
    none = {k: Score(**v) for k, v in found["without"].items()}
    accounts = [r for r in found["handover"]["ssm_state"] if r["word"] == "after"]
    value = [sum(r["running value"][k] for r in accounts) for k in ("alone", "of")]
    control = max(np.array(found[f"control: {s}"]["flip"]).max() for s in ("ssm_state", "resid_post"))
    last = probes["steps"][-1] - 1
    layers = layers_of(probes, "ssm_state")
    reads = [next((i for i in layers if probes[f"ssm_state, layer {i}"]["value"]["score"][j] >= 0.9), None)
             for j in range(last + 1)]  # fmt: skip
    return "\n".join(
        f"- {line}"
        for line in (
            f"The SSM state of all layers, which is all of its memory, moves the answer {state} of the way; "
            f"same-value pairs change {control:.1%} of the answers; unread, it leaves {percent(none['SSM state'])} "
            "right.",
            f"Between unrelated prompts it carries the running value in {value[0]} of {value[1]} cases.",
            f"The layer that moves the answer most, alone: {climb}.",
            "A probe reads the value of steps 1, 2, .. from the SSM state of layer "
            f"{', '.join('none' if i is None else str(i) for i in reads)} on (90 % held out).",
        )
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "models": models, "accuracy": accuracy, "shortcuts": shortcuts, "losses": losses, "depth": depth, "where": where,
    "shifted": shifted, "overt": overt, "alone": alone,
}  # fmt: skip


def page(text: str) -> str:
    """The study's page with what the results say now."""
    for name, make in BLOCKS.items():
        text = placed(text, name, make())
    return text
