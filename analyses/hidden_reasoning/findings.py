"""What the results say in numbers: tables and sentences, made from the results files and put into the study's page."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..pages import placed
from . import say
from .drawing.dimensions import by_dimensions
from .drawing.style import NAMES
from .drawing.trainings import GROUPS, LOSSES, scores
from .experiments.curves import DEPTHS, sizes
from .experiments.results import RESULTS, Read, ResultsError, read, together
from .organism import MODELS
from .say import percent, table

PAGE = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Folder:
    """A folder of results files: `results["patch-masked"]` is what one of them holds, part by part."""

    folder: Path

    def __getitem__(self, name: str) -> Read:
        return self.whole(name)["parts"]

    def paths(self, start: str) -> list[Path]:
        """The files whose names begin so."""
        return sorted(self.folder.glob(f"{start}*.json"), key=lambda path: path.stem)

    def whole(self, name: str) -> Read:
        """A file, its key too."""
        return read(self.folder / f"{name}.json", name.split("-")[0])


def models(results: Folder) -> str:
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
                f"`{recipe['command'].removeprefix('python -m analyses.hidden_reasoning ')}`",
            ]
        )
    return table(["model", "size", "to length", "training, one core", "command"], rows)


def accuracy(results: Folder) -> str:
    """Exact final answers by length, the text before it given, and rows written whole."""
    masked, shown = scores(results["evaluate-masked"]), scores(results["evaluate-masked"], "shown")
    others = [scores(results[f"evaluate-{name}"]) for name in ("state_only", "transformer", "doublethink")]
    bounds = results["shortcuts-masked-arithmetic"]["bounds"]
    rows = []
    for n in (4, 6, 8, 10, 11, 12, 13, 14):
        alone = [f"{(one[n].written or 0) / one[n].prompts:.1%}" for one in (masked, shown)]
        best = max(b.get(str(n), 0) for b in bounds.values())
        cells = [percent(masked[n]), alone[0], percent(shown[n]), alone[1], *(percent(c[n]) for c in others)]
        rows.append([str(n), *cells, f"{best:.0%}"])
    head = ["operations", "`masked`", "written alone", "values shown", "written alone"]
    return table([*head, "`state_only`", "`transformer`", "`doublethink`", "best shortcut"], rows)


def shortcuts(results: Folder) -> str:
    """What the best functions of less than the whole prompt reach."""
    found = {acts: results[f"shortcuts-masked-{acts}"]["bounds"] for acts in ("arithmetic", "s5")}
    rows = [
        [said, *(f"{found[acts][name][str(n)]:.1%}" for acts in found for n in (6, 12))]
        for name, said in (
            ("multiset", "which operations, in any order"),
            ("last 4", "the last 4 operations"),
            ("last 4, and multiset before", "the last 4 operations, and which come before"),
            ("last 1", "the last operation"),
            ("length", "the length alone"),
        )
    ]
    product = [f"{found['arithmetic']['quotient of size 4'][str(n)]:.1%}" for n in (6, 12)]
    rows.append(["product of the multipliers", *product, "-", "-"])
    return table(["best function of", "arithmetic, 6", "arithmetic, 12", "S5, 6", "S5, 12"], rows)


def losses(results: Folder) -> str:
    """Steps until all of lengths 1 to 6 are solved, by loss and depth."""
    found = results["curves-all"]
    rows = []
    for loss, (label, *_) in LOSSES.items():
        row = [label]
        for n in (2, 6):
            runs = [v for k, v in found.items() if k.startswith(f"loss {loss}, {n} layers")]
            row.append(", ".join("never" if r["solved_at"] is None else f"{r['solved_at']:,}" for r in runs))
            row.append(", ".join(str(r["longest"]) for r in runs))
        rows.append(row)
    return table(["loss", "2 layers: solved at step", "longest", "6 layers: solved at step", "longest"], rows)


def depth(results: Folder) -> str:
    """The longest length that is solved, by depth."""
    rows = []
    for name, caption in (("depth", "to length 12"), ("reach", "to length 16")):
        found = [v for k, v in results["curves-all"].items() if k.startswith(name)]
        for (architecture, acts), (label, *_) in GROUPS.items():
            mine = [v for v in found if (v["architecture"], v["acts"]) == (architecture, acts)]
            if mine:
                cells = [[str(v["longest"]) for v in mine if v["n_layer"] == n] for n in DEPTHS]
                rows.append([f"{label}, {caption}", *(", ".join(c) or "-" for c in cells)])
    return table(["longest length solved, each seed", *(f"{n} layers" for n in DEPTHS)], rows)


def width(results: Folder) -> str:
    """The longest length that is solved, by size: what the depth decides, and what the parameters."""
    rows = [
        [f"{count:,}", str(n_layer), str(d_model), ", ".join(map(str, longest))]
        for (count, n_layer, d_model), longest in sizes(results["curves-all"]).items()
    ]
    return table(["parameters", "layers", "d_model", "longest length solved, each seed"], rows)


def where(results: Folder) -> str:
    """Where the running value is, in the model `masked`."""
    differ = results.whole("patch-masked")["key"]["differ"]
    found, probes = results["patch-masked"], results["probe-masked"]
    pairs, between = found["value: pairs"], say.between(found)
    sets, last = found["windows: recurrent_state"], found["value: ssm_state"]["share"][-1][-1]
    three = np.array(sets["share"])[[i for i, r in enumerate(sets["layers"]) if np.size(r) == 3]].max(0)
    rows = [r for r in found["handover"]["conv_state"] if r["word"] == "after"]
    worst, value = say.handed(rows)
    step, right, of = say.means(found["handover"]["conv_state"])
    others = [sum(r[name]["alone"] for r in rows) for name in ("done", "partial sum", "base")]
    none = say.without(found)
    needed = {s: np.array(found[f"needed: {s}"]["right"]) for s in ("ssm_state", "conv_state")}
    erased, goes, stays = say.erased(probes)
    controls = [control["variance"] for e in erased for control in e["controls"]]
    taken = [e["space"]["variance"] for e in erased]
    steps = len(probes["steps"])
    ssm = [say.best(probes, "ssm_state", "value", j) for j in range(steps)]
    fresh = [say.untrained(probes, "ssm_state", "value", j) for j in range(steps)]
    return say.bullets(
        f"**Full hand-over.** In {pairs['pairs']} pairs of prompts of {found['handover']['num_steps']} operations "
        f"that differ in operation {differ} ({pairs['gap_nats']:.1f} nats apart), the donor's conv state of all layers "
        f"moves the answer {say.ends(found, 'value: conv_state', between)} of the way at every word from the differing "
        f"one's echo to the last but one; the SSM state of all layers {say.ends(found, 'value: ssm_state', between)}. "
        f"At the last word, where the donor's next conv state comes too late, it is {last:.2f}.",
        "**Control.** Where the other operation leads to the same value, patching any site at any place changes the "
        f"answer in {say.control(found, 'ssm_state', 'conv_state', 'recurrent_state', 'resid_post')}.",
        "**Layer by layer.** The layer whose conv state alone moves the answer most, and how far: "
        f"{say.peaks(found, 'value: conv_state')}. Near the end it is spread: three neighbouring layers' whole memory "
        f"moves the answer {three[0]:.2f} of the way after operation 2, and {three[-1]:.2f} before the last.",
        "**What is handed over.** Between unrelated prompts, the conv states of all layers carry the *running value*, "
        "while the SSM states stay the base's. Where no other account foretells the same answer, it is what the base's "
        f"remaining operations make of the donor's value in {value} at the worst step, {worst['step']}; the donor's "
        "final answer, the partial sum that the operations so far will have added to the final value, or the base's "
        f"own answer in {sum(others)} cases at all steps.",
        "**Nothing else is needed.** A memory that kept the operations for later would hand a value over just so. So "
        "the conv states of all prompts that have come to some value by any operations are averaged, and the *mean* is "
        f"put in for the value of another prompt: {right} of {of} answers are what the remaining operations make of "
        f"it, at the worst word, step {step}.",
        "**Necessity.** With no token reading any SSM state, in all layers at once (y = D u), "
        f"{percent(none['SSM state']['answers'])} of {none['SSM state']['answers'].prompts} answers stay right, the "
        f"text before them given; with every conv state at its mean {percent(none['conv state']['answers'])}. A mean "
        f"in all layers at one word leaves {needed['ssm_state'][-1].min():.0%} (SSM state) and down to "
        f"{needed['conv_state'][-1].min():.0%} (conv state) right; in one layer alone never fewer than "
        f"{needed['conv_state'][:-1].min():.1%}.",
        "**What the SSM state is for.** The echo: which operation comes next stands far back in the prompt. With "
        f"the SSM state unread {none['SSM state']['echo'].share:.1%} of the echoed operations are right (one in "
        f"seven would be by chance), of the whole model {none['nothing']['echo'].share:.1%}.",
        "**Probes mislead.** From the SSM state, of which the answers need nothing, a linear probe reads the "
        f"running value at every step, at the worst {min(ssm):.1%} of it (of an untrained model {say.listed(fresh)}); "
        f"and, {steps - 1} operations into {steps}, the product of the multipliers to come at "
        f"{say.best(probes, 'ssm_state', 'rest', steps - 2):.0%}, which is the last operation, still in the state: of "
        f"an untrained model at {say.untrained(probes, 'ssm_state', 'rest', steps - 2):.0%}. From the "
        f"residual stream it reads the value of operations 1, 2, .. from layer {say.first_read(probes, 'resid_post')} "
        "on, and two operations before the end the final answer at "
        f"{say.best(probes, 'resid_post', 'answer', steps - 3):.0%}, which is chance.",
        f"**Erasure.** The {erased[0]['dimensions']} dimensions in which the value's class means differ, projected "
        f"out of the residual stream after layer 0, 1, .., leave {say.listed(goes)} of the "
        f"answers right; spaces of as many dimensions, made in the same way of shuffled labels, which take "
        f"{min(controls):.0%} to {max(controls):.0%} of the stream's variance where those take {min(taken):.0%} to "
        f"{max(taken):.0%}, leave, in the mean of {len(erased[0]['controls'])} draws, {say.listed(stays)}.",
    )


def seeds(results: Folder) -> str:
    """The main findings in `masked`, and in every model that was trained as it was with another seed."""
    columns, kept = {}, []
    for path in results.paths("patch-masked"):
        name = path.stem.removeprefix("patch-")
        found, asked = results[f"patch-{name}"], scores(results[f"evaluate-{name}"])
        rows, none, between = found["handover"]["conv_state"], say.without(found), say.between(found)
        after = [r for r in rows if r["word"] == "after"]
        handed = [(r["running value"]["alone"], r["running value"]["of"]) for r in after]
        columns[f"`{name}`"] = {
            **{f"right answers, {n} operations": percent(asked[n]) for n in (8, 12, 13) if n in asked},
            "the donor's conv states move the answer": say.ends(found, "value: conv_state", between),
            "its SSM states": say.ends(found, "value: ssm_state", between),
            "conv states hand over the running value": say.worst(handed),
            "so do the mean conv states of a value": say.worst([(r["mean"]["right"], r["mean"]["of"]) for r in rows]),
            "right answers, no SSM state read": percent(none["SSM state"]["answers"]),
            "right echoes": percent(none["SSM state"]["echo"]),
            "right answers, every conv state at its mean": percent(none["conv state"]["answers"]),
        }
        if (results.folder / f"probe-{name}.json").exists():
            probes = results[f"probe-{name}"]
            ssm = [say.best(probes, "ssm_state", "value", j) for j in range(len(probes["steps"]))]
            _, goes, stays = say.erased(probes)
            columns[f"`{name}`"] |= {
                "a probe of the SSM states reads the value, at worst": f"{min(ssm):.1%}",
                "it reads operation 1, 2, .. off the stream from layer": say.first_read(probes, "resid_post"),
                "right answers, the value erased after a layer": f"{min(goes):.0%} to {max(goes):.0%}",
                "as much erased of shuffled labels": f"{min(stays):.0%} to {max(stays):.0%}",
            }
        kept += [
            f"In `{name}`, where the conv states are handed over after operation {r['step']}, the answer stays the "
            f"base's own in {r['base']['alone']} of {r['base']['of']} cases in which nothing else foretells it."
            for r in after
            if r["base"]["alone"]
        ]
    return "\n\n".join([say.beside(columns), *kept])


def shifted(results: Folder) -> str:
    """Hand-overs from one step to another, by the steps between them and the operations of the prompts."""
    found = {int(k.split()[1]): v for k, v in results["patch-masked"].items() if k.startswith("shifted, ")}
    most = max(found) - 2
    rows = []
    for shift in range(-most, most + 1):
        row = [f"{shift:+d}" if shift else "0"]
        for name in ("right", "said"):
            for cells in found.values():
                shares = [r[name] / r["of"] for r in cells if r["from"] - r["to"] == shift]
                low, high = (f"{100 * f(shares):.0f}" for f in (min, max)) if shares else ("-", "-")
                row.append(low if low == high else f"{low} .. {high}")
        rows.append(row)
    heads = [f"{what}, {n}" for what in ("donor's value %", "a value said %") for n in found]
    return table(["donor's step - base's", *heads], rows)


def overt(results: Folder) -> str:
    """Hidden and overt value, in the model `doublethink`."""
    found = results["patch-doublethink"]
    between, pairs = say.between(found)[:-1], found["value: pairs"]
    cross = max(np.array(found[f"overt: {s}"]["flip"]).max() for s in ("recurrent_state", "resid_post"))
    back = max(np.array(found[f"value, next overt: {s}"]["flip"]).max() for s in ("recurrent_state", "resid_post"))
    shown = found["overt, next overt: conv_state"]
    best = np.array(shown["share"])[:-1].argmax(0)
    words = [pairs["words"][p] for p in shown["positions"]]
    after = sorted({int(layer) for layer, word in zip(best, words, strict=True) if word == "[v]"})
    groups = [found[f"channels: conv_state, {words} after"] for words in (1, 2)]
    sums = [[np.nansum(group[name]) for name in ("hidden", "overt")] for group in groups]
    size = np.size(groups[0]["hidden"])
    none = say.without(found)
    return say.bullets(
        f"In {pairs['pairs']} pairs whose hidden value differs and whose text shows the same, the conv state of all "
        f"layers moves the answer {say.ends(found, 'value: conv_state', between)} of the way, the SSM state "
        f"{say.ends(found, 'value: ssm_state', between)}.",
        "Patching the hidden value, in any layer and at any word, changes the next overt value in at most "
        f"{say.few(back, pairs['pairs'])}; patching the overt value the final answer in "
        f"{say.few(cross, pairs['pairs'])}.",
        "The hidden value climbs as in `masked`: the conv state that does most alone is that of layer "
        f"{say.peaks(found, 'value: conv_state')}. The overt value is read again from the text: after each written one "
        f"the conv state that moves the next most is that of layer {' or '.join(map(str, after))}, at every step.",
        f"Whether they share channels is open: what {size} groups of channels of the conv states do one at a time adds "
        f"up to {sums[0][0]:.2f} (hidden) and {sums[0][1]:.2f} (overt) one word on, {sums[1][0]:.2f} and "
        f"{sums[1][1]:.2f} two words on, where all of them together do nearly all of it.",
        f"With no token reading any SSM state {percent(none['SSM state']['answers'])} of the final answers stay "
        f"right, and {none['SSM state']['echo'].share:.1%} of the echoed operations.",
    )


def alone(results: Folder) -> str:
    """The models that have no conv's memory: the one that ships, and every one that was trained with another seed."""
    columns = {}
    for path in results.paths("patch-state_only"):
        name = path.stem.removeprefix("patch-")
        found, asked, probes = results[f"patch-{name}"], scores(results[f"evaluate-{name}"]), results[f"probe-{name}"]
        rows = found["handover"]["ssm_state"]
        handed = [r["running value"] for r in rows if r["word"] == "after"]
        columns[f"`{name}`"] = {
            **{f"right answers, {n} operations": percent(asked[n]) for n in (6, 7)},
            "the donor's SSM states move the answer": say.ends(found, "value: ssm_state", say.between(found)),
            "answers that change where the values agree": say.control(found, "ssm_state", "resid_post"),
            "right answers, no SSM state read": percent(say.without(found)["SSM state"]["answers"]),
            "SSM states hand over the running value": say.worst([(r["alone"], r["of"]) for r in handed]),
            "so do the mean SSM states of a value": say.worst([(r["mean"]["right"], r["mean"]["of"]) for r in rows]),
            "the layer that alone moves the answer most": say.peaks(found, "value: ssm_state"),
            "the layer off which a probe reads operation 1, 2, ..": say.first_read(probes, "ssm_state"),
        }
    return say.beside(columns)


def dimensions(results: Folder) -> str:
    """Answers that follow the donor's value when k dimensions of a memory are swapped, each seed; and the controls."""
    columns = {}
    for name in ("masked", "state_only"):
        made, found = results.whole(f"align-{name}"), by_dimensions(results[f"align-{name}"])
        line = {f"{k}": [one["held_out"] for one in several] for k, several in found.items()}
        for what, control in (("those searched", "searched"), ("all", "whole"), ("none", "nothing")):
            line[what] = [one["controls"][control][0] for one in found[min(found)]]
        for k, several in found.items():
            if "random" in several[0]["controls"]:
                line[f"{k}, the pairs that were fitted"] = [one["fitted"] for one in several]
                for control, kind in say.SWAPS.items():
                    line[f"{k}, {kind}"] = [one for swap in several for one in swap["controls"][control]]
        line[f"{max(found)}, the pairs that were fitted"] = [one["fitted"] for one in found[max(found)]]
        memory = NAMES[made["key"]["site"]] + "s"
        said = {what: ", ".join(say.swapped(one) for one in ones) for what, ones in line.items()}
        columns[f"`{name}`, {memory}"] = said
    return say.beside(columns, "dimensions swapped")


BLOCKS: dict[str, Callable[[Folder], str]] = {
    "models": models, "accuracy": accuracy, "shortcuts": shortcuts, "losses": losses, "depth": depth, "width": width,
    "where": where, "seeds": seeds, "shifted": shifted, "overt": overt, "alone": alone, "dimensions": dimensions,
}  # fmt: skip


def page(text: str, folder: Path = RESULTS) -> str:
    """The study's page with what the results of a folder say.

    Raises:
        ResultsError: results that are not there, or not whole. PageError: a page without the marks.
    """
    results = Folder(folder)
    together({path.stem: results.whole(path.stem) for path in results.paths("")})
    for name, make in BLOCKS.items():
        try:
            text = placed(text, name, make(results))
        except KeyError as error:
            raise ResultsError(f"{name}: {folder} lacks {error}; go on with the command that makes it.") from None
    return text
