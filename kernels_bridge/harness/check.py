"""The check: a target against the readable model in float64, quantity by quantity, clean and under edits."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Edit, Mamba, Scale, Set, Zero, at
from minimal_mamba.errors import InputError
from minimal_mamba.files import make_folder, write_json
from minimal_mamba.provenance import model_digest, provenance

from . import bounds
from .draw import draw_edits, draw_ids, draw_lengths, draw_state
from .first import First, localise
from .operations import operations
from .rows import Errors, Row, compare, errors, from_columns, to_columns
from .targets import NUDGED, NUDGED_WHOLE, reference, roundings
from .watch import EACH, Implementation, Ours, Seen, of_layers, updated

LENGTHS = (1, 2, 3, 4, 5, 17, 127, 128, 129, 255, 372, 1023, 1134, 2047, 2048, 2049, 4097)
SHORT = (1, 2, 3, 4, 5, 17, 63, 129)  # on a CPU
KINDS = ("operations", "mixers", "layers", "model", "edits", "gradients", "decoding", "padding", "updated")
ADDED = ("ssm_state", "state_write", "conv_state")  # sites whose gradients a scan can give without a readable step
TOKENS = 128  # of a batch at least
PADDED = 4  # rows of unequal lengths at least
DECODED = 33  # tokens fed one by one at most
VERSION = 5


@dataclass(frozen=True)
class Case:
    """One thing to compare: a kind, and the batch, length and seed of what it runs on."""

    kind: str
    b: int
    l: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}, batch {self.b}, length {self.l}, seed {self.seed}"


class Blind(InputError):
    """Weights under which a fault in the scan hardly shows, so that no verdict can be given."""


def controls(model: Mamba, ids: Tensor) -> dict[str, float]:
    """Relative change of the logits in float64 under each negative control: what a check would see of it."""
    exact = reference(model)
    layers = range(model.config.n_layer)
    seen = exact.forward(ids)
    first = [Set(at.B(layer=0), seen["C", 0]), Set(at.C(layer=0), seen["B", 0])]
    faults = {
        "the scan zeroed": [Zero(at.y(layer=list(layers)))],
        "no recurrence (decay 0)": [Zero(at.decay(layer=list(layers)))],
        "B and C of one layer exchanged": first,
    }
    true = seen["logits", None]
    return {
        name: float((exact.forward(ids, edits=edits, inside=False)["logits", None] - true).norm() / true.norm())
        for name, edits in faults.items()
    }


def refuse_blind(model: Mamba, seed: int) -> dict[str, float]:
    """The controls' figures.

    Raises:
        Blind: one of them moves the logits less than `bounds.SEEN` says.
    """
    found = controls(model, draw_ids(model.config, 2, 33, seed).to(model.device))
    weak = {name: share for name, share in found.items() if not share >= bounds.SEEN[name]}
    if weak:
        told = "; ".join(
            f"{name} moves them {share:.2%}, needed {bounds.SEEN[name]:.0%}" for name, share in weak.items()
        )
        raise Blind(
            f"no verdict: with these weights a fault would hardly show in the logits ({told}). Check other weights: "
            "without --model the check draws some under which the scan carries the logits."
        )
    return found


def cases(kinds: Sequence[str], lengths: Sequence[int], b: int, seed: int) -> list[Case]:
    """Every case of these kinds and lengths; short sequences get more rows, so that rounding averages. The longest is
    also run and decoded as one row; after a change of the weights one length is enough.
    """
    made = []
    for kind in kinds:
        least = max(b, PADDED) if kind == "padding" else b
        every = [Case(kind, max(least, TOKENS // l), l, seed + i) for i, l in enumerate(lengths)]
        made += every if kind != "updated" else [every[len(every) // 2]]
        if kind in ("model", "decoding"):
            made.append(Case(kind, 1, max(lengths), seed + len(lengths)))
    return made


def run_case(case: Case, target: Implementation, model: Mamba) -> list[Row]:
    """Compare target, readable and reference on one case."""
    true = reference(model)
    ids = draw_ids(model.config, case.b, case.l, case.seed).to(model.device)
    positions = sorted({0, 1, case.l // 2, case.l - 2, case.l - 1} & set(range(case.l)))
    several = NUDGED if case.kind in ("mixers", "layers") else NUDGED_WHOLE
    wide_states = isinstance(target, Ours) and model.dtype.itemsize == 2  # as `MambaState` says; others' need not be

    def rows(*asked: Callable[[Implementation], dict[Any, Tensor]]) -> list[Row]:
        """Of what the target gives, asked in each of these ways; the first asks for all that the others do.

        Another rounding of the readable model can only widen a bound: it is asked for where a row has failed.
        """
        want, got = asked[0](true), [ask(target) for ask in asked]
        own: list[Errors] = []
        found: list[Row] = []
        for one in roundings(model, case.seed, several):
            own.append(errors(asked[0](one), want))
            found = [r for g in got for r in compare(case.name, case.kind, g, own, want, model.dtype, wide_states)]
            if all(r.passed for r in found):
                break
        return found

    def whole(**how: Any) -> list[Row]:
        """Without a look inside, as users run it; only ours runs something else where states are recorded, or none is
        asked for.
        """
        asked: list[Callable[[Implementation], Seen]] = [lambda one: one.forward(ids, inside=False, **how)]
        if ours:
            asked += [lambda one: one.forward(ids, inside=False, keep=False, **how)]
        if held := target.ops.records if isinstance(target, Ours) else ():
            each = [s for s in EACH if s in held]
            asked.insert(0, lambda one: one.forward(ids, inside=False, at_positions=positions, each=each, **how))
        return rows(*asked)

    def gradients(*edits: Edit, of: Tensor = ids, **how: Any) -> list[Row]:
        """By all weights at once, and by states too, for which a block is gone through line by line."""
        by_states = [lambda one: one.gradients(of, edits, each=ADDED, **how)] if ours else []
        return rows(*by_states, lambda one: one.gradients(of, edits, **how))

    ours, memory = isinstance(target, Ours), draw_state(model, case.b, case.seed)
    if case.kind == "operations":
        assert isinstance(target, Ours)
        return operations(case.name, target.ops, true, model, ids, positions)
    if case.kind == "mixers":
        inputs = of_layers("mixer_in", true.forward(ids), model.dtype)
        found = rows(lambda one: one.mixers(inputs))
        if ours:
            found += rows(lambda one: one.mixers(inputs, memory))
            lengths = draw_lengths(case.b, case.l, case.seed)
            if case.seed % 2:
                found += rows(lambda one: one.mixers(inputs, lengths=lengths))
            found += rows(*(lambda one, keep=keep: one.last(inputs, lengths, keep) for keep in (True, False)))
        return found
    if case.kind == "layers":
        feed = of_layers("resid_pre", true.forward(ids))
        return rows(lambda one: one.forward(ids, feed=feed, at_positions=positions))
    if case.kind == "model":
        return whole()
    if case.kind == "edits":
        edits, half = draw_edits(model.config, case.b, case.l, case.seed), (case.l + 1) // 2
        found = rows(lambda one: one.forward(ids, edits=edits, at_positions=positions))
        found += whole(edits=edits) + whole(edits=edits, memory=memory)
        # every row has the positions that are edited, but one that only the first row may have; and most are padded
        late = at.recurrent_state(layer=case.seed % model.config.n_layer, pos=max(case.l - 2, 0))
        early = [*draw_edits(model.config, case.b, half, case.seed), Scale(late, torch.tensor(0.5), rows=[0])]
        lengths = [max(n, half) for n in draw_lengths(case.b, case.l, case.seed)]
        found += gradients(*early, lengths=lengths) if case.seed % 2 else gradients(*edits)
        return found + rows(lambda one: one.forward(ids, edits=early, lengths=lengths))
    if case.kind == "gradients":
        return gradients()
    if case.kind == "decoding":
        short = ids[:, :DECODED]
        some = short.shape[1] // 2
        sizes = [some, short.shape[1] - some - 1, 1]  # a prompt, more of it, a token
        pieces = [lambda one: one.pieces(short, sizes)] if ours and case.l > 2 else []
        return rows(lambda one: one.decode(short), *pieces) + (whole(memory=memory) if ours else [])
    if case.kind == "padding":
        lengths = draw_lengths(case.b, case.l, case.seed)
        found = whole(lengths=lengths)
        if ours:  # of fewer rows, as the readable model's backward holds every state; from a memory every other time
            found += whole(lengths=lengths, memory=memory)
            few = slice(1, 1 + max(2, TOKENS // case.l))
            start = draw_state(model, len(ids[few]), case.seed) if case.seed % 2 else None
            found += gradients(of=ids[few], lengths=lengths[few], memory=start)
        return found
    if case.kind == "updated":  # what was made of the weights before is of no use after
        parts = [replace(case, kind=kind) for kind in ("model", "gradients", "decoding")]
        for part in parts:
            run_case(part, target, model)
        with updated(model, target.module):
            found = [row for part in parts for row in run_case(part, target, model)]
        return [replace(row, case=case.name, kind=case.kind) for row in found]
    raise InputError(f"no kind of case {case.kind!r}; there are {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Report:
    """What a check found."""

    target: str
    rows: list[Row]
    first: First | None
    controls: dict[str, float]
    unseen: list[str]
    settings: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every row is within its bound, and one of them says something."""
        return any(r.telling for r in self.rows) and all(r.passed for r in self.rows)

    @property
    def verdict(self) -> str:
        """What the file says: "pass", "fail", or, where no row says anything, "none"."""
        return "pass" if self.passed else "none" if all(r.passed for r in self.rows) else "fail"

    @property
    def mute(self) -> dict[str, int]:
        """Of each kind, the rows that say nothing: the readable model in this type errs there by half or more."""
        return dict(Counter(r.kind for r in self.rows if r.passed and not r.telling))


def check(
    target: Implementation,
    model: Mamba,
    *,
    kinds: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    batch: int = 2,
    seed: int = 0,
    path: Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Report:
    """Hold a target against the readable model in float64.

    Args:
        target: of `targets.target`, or an `Ours` or `Theirs` of your own, on the weights of `model`.
        kinds: which of `KINDS`; all that the target can take if None.
        lengths: of the sequences; `LENGTHS` on a GPU, `SHORT` on a CPU, if None.
        path: a JSON file that is written after every case. One that was interrupted goes on, with the same settings,
            packages and commit, unless `fresh`; a finished one begins again, as the target may be another by now.
    Raises:
        Blind: no verdict can be given under these weights.
        InputError: `path` holds another check.
    """
    can = KINDS if isinstance(target, Ours) else tuple(k for k in KINDS if k not in ("operations", "edits"))
    if not isinstance(target, Ours) and not getattr(target, "hf", False):
        can = tuple(k for k in can if k != "padding")
    kinds = list(can if kinds is None else kinds)
    for kind in kinds:
        if kind not in can:
            raise InputError(f"target {target.name!r} has no cases {kind!r}; it has {', '.join(can)}.")
    lengths = list(lengths or (LENGTHS if model.device.type == "cuda" else SHORT))
    if min(*lengths, batch) < 1:
        raise InputError(f"lengths {lengths}, batch {batch}: of a sequence one token at least, and one row at least.")
    settings = {
        "version": VERSION, "target": target.name, "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type, "config": asdict(model.config), "weights": model_digest(model),
        "kinds": kinds, "lengths": lengths, "batch": batch, "seed": seed,
        "float32": precision(), "made by": {k: v for k, v in provenance().items() if k in ("packages", "commit")},
    }  # fmt: skip
    shares = refuse_blind(model, seed)
    done: dict[str, list[Row]] = {} if path is None or fresh else _resume(path, settings)
    wanted = cases(kinds, lengths, batch, seed)
    if path is not None:  # that it can be written shows before anything is computed
        _write(path, settings, shares, done, None, False)
    for case in tqdm(wanted, desc=f"check {target.name}", disable=not progress):
        if case.name not in done:
            done[case.name] = run_case(case, target, model)
            if path is not None:
                _write(path, settings, shares, done, None, len(done) == len(wanted))
    rows = [row for case in wanted for row in done[case.name]]
    failed = {(c.l, c.b, c.seed) for c in wanted if not all(r.passed for r in done[c.name])}
    first = None
    for l, b, own_seed in sorted(failed):
        first = first or localise(target, model, draw_ids(model.config, b, l, own_seed).to(model.device))
    ids = draw_ids(model.config, 1, 3, seed).to(model.device)
    unseen = sorted({k[0] for k in reference(model).forward(ids)} - {k[0] for k in target.forward(ids)})
    if "gradients" in kinds:
        unseen += sorted(_gradients_of(model) - {r.quantity for r in rows if r.kind == "gradients"})
    report = Report(target.name, rows, first, shares, unseen, settings)
    if path is not None:
        _write(path, settings, shares, done, report, True)
    return report


def _gradients_of(model: Mamba) -> set[str]:
    parts = [name.split(".") for name, _ in model.named_parameters()]
    return {"d " + ".".join(p[3:] if p[:2] == ["backbone", "layers"] else p) for p in parts}


def precision() -> dict[str, str]:
    """The switches of torch and Triton that change a float32 product, as they stand."""
    import os

    return {
        "cuda.matmul.allow_tf32": str(torch.backends.cuda.matmul.allow_tf32),
        "cudnn.allow_tf32": str(torch.backends.cudnn.allow_tf32),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "TRITON_F32_DEFAULT": os.environ.get("TRITON_F32_DEFAULT", "unset"),
    }


def exact_products() -> None:
    """Switch TF32 off, in torch and in Triton, so that float32 means float32."""
    import os

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def _resume(path: Path, settings: dict[str, Any]) -> dict[str, list[Row]]:
    import json

    if not path.exists():
        return {}
    if not path.is_file():
        raise InputError(f"{path} is no file. Give another.")
    try:
        held = json.loads(path.read_text())
        finished = held["verdict"] is not None
        differ = [k for k, v in json.loads(json.dumps(settings)).items() if held["settings"].get(k) != v]
        if finished and differ in ([], ["made by"]):
            return {}
        if differ:
            raise InputError(f"{path} holds a check with another {', '.join(differ)}. Give another file, or --fresh.")
        return {name: from_columns(name, columns) for name, columns in held["cases"].items()}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} holds no check that can be gone on with ({error!r}). Give another file, or --fresh."
        ) from None


def _write(
    path: Path, settings: dict[str, Any], shares: dict[str, float], done: dict[str, list[Row]], report: Report | None,
    complete: bool,
) -> None:  # fmt: skip
    make_folder(path.parent)
    verdict = None if report is None else report.verdict
    write_json(path, {
        "verdict": verdict if complete else None,
        "first_to_part": None if report is None or report.first is None else asdict(report.first),
        "not_seen": None if report is None else report.unseen,
        "says_nothing": None if report is None else report.mute,
        "controls": shares,
        "settings": settings,
        "provenance": provenance(),
        "cases": {name: to_columns(rows) for name, rows in done.items()},
    })  # fmt: skip
