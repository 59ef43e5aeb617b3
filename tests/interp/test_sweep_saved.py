"""A sweep on disk: interrupted, it goes on to the same numbers; whatever is wrong with a folder raises."""

import contextlib
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import tiny

from interp import (
    Apply,
    Circuit,
    Scale,
    Zero,
    accuracy,
    at,
    load_edits,
    load_grid,
    logit_diff,
    patch_grid,
    replay,
    run,
    save_edits,
    sweep,
)  # fmt: skip
from interp.sweep import batch
from interp.sweep.functions import known_by
from interp.sweep.parts import bands
from minimal_mamba.errors import CheckpointError, EditError
from minimal_mamba.provenance import version

MODEL = tiny(seed=6, dtype=torch.float32)
RNG = torch.Generator().manual_seed(0)
IDS, DONOR = (torch.randint(0, 29, (3, 40), generator=RNG) for _ in range(2))
CELLS = [[Scale(at.ssm_state(layer=i, pos=p), 1.5)] for i in range(3) for p in range(40)]
MEMORY = 1 << 20  # small: several groups


def score(logits):
    return logit_diff(logits, 3, 5)


def third(logits):
    return logits[:, 2, 1] + logits[:, -1, 1]


def swept(path=None, metric=score, cells=CELLS, **kwargs):
    return sweep(MODEL, IDS, cells, metric, memory=MEMORY, progress=False, path=path, **kwargs)


def test_an_interrupted_sweep_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    want = swept()
    assert len(want.groups) > 5
    run_group, calls = batch.Batch.run, []

    def breaks(self):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return run_group(self)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Batch, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path / "s")
    kept = sorted(f.name for f in (tmp_path / "s").glob("group-*"))
    assert 0 < len(kept) < len(want.groups)
    ran = []
    plain = batch.Batch.run
    monkeypatch.setattr(batch.Batch, "run", lambda self: ran.append(1) or plain(self))
    again = swept(tmp_path / "s")
    assert torch.equal(again.values, want.values) and torch.equal(again.base, want.base)
    assert len(ran) == len(want.groups) - len(kept)  # what was done is not done again
    ran.clear()
    assert torch.equal(swept(tmp_path / "s").values, want.values) and not ran


def test_a_folder_that_is_something_else(tmp_path):
    swept(tmp_path / "s", cells=CELLS[:4])
    changed = {
        "cells": {"cells": [*CELLS[:3], [Zero(at.u(layer=0, pos=0))]]},
        "base": {"metric": third, "cells": CELLS[:4]},
        "backend": {"backend": "reference", "cells": CELLS[:4]},
        "lengths": {"lengths": [40, 39, 40], "cells": CELLS[:4]},
    }
    value = [*CELLS[:3], [Scale(CELLS[3][0].address, 1.25)]]  # another one at the same place
    for what, kwargs in [*changed.items(), ("cells", {"cells": value})]:
        with pytest.raises(CheckpointError, match=f"holds another sweep: they differ in .*{what}"):
            swept(tmp_path / "s", **kwargs)
    with torch.no_grad():
        other = tiny(seed=6, dtype=torch.float32)
        other.backbone.layers[0].mixer.D[0] += 1
    with pytest.raises(CheckpointError, match=r"differ in .*model"):
        sweep(other, IDS, CELLS[:4], score, memory=MEMORY, progress=False, path=tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds other files and no sweep\.json"):
        swept(tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


HALF = 0.5


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        for write in (swept, partial(save_edits, CELLS[0])):
            with pytest.raises(CheckpointError, match="is a file, or in one; give a folder"):
                write(folder)


def test_what_is_saved_names_the_version_and_goes_on_with_no_other(tmp_path, monkeypatch):
    want, head, here = swept(tmp_path / "s", cells=CELLS[:4]), tmp_path / "s" / "sweep.json", version()
    patch_grid(MODEL, IDS, DONOR, site="y", metric=score, layers=0, positions=-1, path=tmp_path / "g", progress=False)
    save_edits(CELLS[0], tmp_path / "e")
    Circuit((), (), ()).save(tmp_path / "c.json")
    for file in (head, *(tmp_path / name for name in ("g/sweep.json", "g/grid.json", "e/edits.json", "c.json"))):
        told = json.loads(file.read_text())["provenance"]
        assert told["packages"]["mambascope"] == here is not None and "commit" in told
    assert load_edits(tmp_path / "e") == CELLS[0] and len(Circuit.load(tmp_path / "c.json")) == 0
    torch.testing.assert_close(load_grid(tmp_path / "g").base, want.base)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "9.0")
        with pytest.raises(CheckpointError, match=rf"differ in mambascope \({here} there, 9\.0 here\)"):
            swept(tmp_path / "s", cells=CELLS[:4])
    old = json.loads(head.read_text())
    del old["provenance"]  # as it was written before
    head.write_text(json.dumps(old))
    assert torch.equal(swept(tmp_path / "s", cells=CELLS[:4]).values, want.values)


def test_a_sweep_of_another_function_is_another(tmp_path):
    """Of the same name: by code, by what it captured, by a global value, by a bound argument."""

    def ways(k):
        yield lambda x: k * x
        yield partial(torch.mul, torch.tensor(k))
        yield lambda x, k=k: (lambda y: y * k)(x)
        yield partial(lambda a, x: torch.stack([c * x for c in a]).sum(0), [k, 1.0])

    def cells(fn):
        return [[Apply(at.u(layer=0, pos=2), fn)]]

    for i, (one, two) in enumerate(zip(ways(2.0), ways(3.0), strict=True)):
        first = swept(tmp_path / f"{i}", cells=cells(one)).values
        again = next(fn for j, fn in enumerate(ways(2.0)) if j == i)
        assert torch.equal(swept(tmp_path / f"{i}", cells=cells(again)).values, first)
        with pytest.raises(CheckpointError, match="differ in cells"):
            swept(tmp_path / f"{i}", cells=cells(two))
    bodies = [lambda x: x * HALF, lambda x: x + HALF]
    for fn in bodies:
        fn.__qualname__ = "same"
    swept(tmp_path / "body", cells=cells(bodies[0]))
    with pytest.raises(CheckpointError, match="differ in cells"):
        swept(tmp_path / "body", cells=cells(bodies[1]))
    for i, value in enumerate((0.5, 0.25)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "HALF", value)
            with pytest.raises(CheckpointError, match="differ in cells") if i else contextlib.nullcontext():
                swept(tmp_path / "body", cells=cells(bodies[0]))
    with pytest.raises(EditError, match=r"path= cannot tell .* it holds .* Held"):
        swept(tmp_path / "object", cells=cells(Held()))


class Held:
    def __call__(self, x):
        return 2 * x


def helper(x):
    return 2 * x


def other(x):
    return 3 * x


def uses_helper(x):
    return helper(x)


def test_what_a_function_is_known_by(monkeypatch):
    """All that can change what it does, as far as it can be seen; and nothing else."""

    def never_asked(x):
        return unset if x is None else x

    def captures(value):
        return lambda x: (value, x)[1]

    before = known_by(uses_helper)
    monkeypatch.setitem(globals(), "helper", other)
    assert known_by(uses_helper) != before
    one, two = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert known_by(one.forward) == known_by(one.forward) != known_by(two.forward)
    assert known_by(torch.no_grad()(captures(1.0))) != known_by(torch.no_grad()(captures(2.0)))
    values = [
        np.arange(3)[::-1], np.arange(3), np.array(["a"]), {1, 2}, frozenset("ab"), range(3), np.dtype("int8"), np.sum,
        torch.relu, torch.nn.functional.relu, torch.ones(2, dtype=torch.cfloat).conj(), {"a": [1, (2.0, None)]}, one,
        two, Held, np.float64(1), torch.float32, math.sqrt, lambda x: x, lambda x: -x,
    ]  # fmt: skip
    found = [known_by(captures(value)) for value in values]
    assert len(set(found)) == len(values) and found == [known_by(captures(value)) for value in values]
    assert known_by(never_asked) == known_by(never_asked)
    for value in (Held(), np.array([Held()]), torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(EditError, match="cannot tell"):
            known_by(captures(value))
    unset = 0
    assert never_asked(unset) == 0


class Settings:
    HALF, TOKENS = 0.5, [1, 2]


def reads_constants(x):
    return sum(x * Settings.HALF for _ in Settings.TOKENS) * contextlib.SCALE * reads_constants.power


@pytest.mark.parametrize(("owner", "name", "value"), [
    (Settings, "HALF", 0.25), (Settings, "TOKENS", [1]), (contextlib, "SCALE", 3.0), (reads_constants, "power", 3),
])  # fmt: skip
def test_the_constants_that_a_function_reads_from_a_module_or_a_class_are_its_own(owner, name, value, monkeypatch):
    monkeypatch.setattr(contextlib, "SCALE", 2.0, raising=False)
    monkeypatch.setattr(reads_constants, "power", 2, raising=False)
    before = known_by(reads_constants)
    monkeypatch.setattr(contextlib, "UNREAD", 2.0, raising=False)
    assert known_by(reads_constants) == before
    monkeypatch.setattr(owner, name, value)
    assert known_by(reads_constants) != before


def is_token(k, logits):
    return (logits[:, -1] > 1e6)[:, k].float()


def test_a_sweep_of_another_metric_is_another(tmp_path):
    """Also where both say the same of the base run."""
    answers = run(MODEL, IDS).last_logits[:, :29].argmax(-1)
    foil = (answers + 1) % 29

    def right(logits):
        return accuracy(logits[..., :29], answers)

    def above(logits):
        return (logit_diff(logits, answers, foil) > 0).float()

    for k in (3, 5):  # tokens that are never the likeliest one
        metric = partial(is_token, k)
        with pytest.raises(CheckpointError, match="differ in metrics") if k == 5 else contextlib.nullcontext():
            swept(tmp_path / "token", metric, CELLS[:4])
    folder = tmp_path / "right"
    swept(folder, right, CELLS[:4])
    assert torch.equal(swept(folder, right, CELLS[:4]).base, swept(None, above, CELLS[:4]).base)
    with pytest.raises(CheckpointError, match="differ in metrics"):
        swept(folder, above, CELLS[:4])


def test_damaged_files(tmp_path):
    want = swept(tmp_path / "s")
    file = sorted((tmp_path / "s").glob("group-*"))[1]
    good = file.read_bytes()
    flipped = good[:-3] + bytes([good[-3] ^ 64]) + good[-2:]
    for bad in (good[: len(good) // 2], b"", good[:-4], flipped):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"group-00001\.safetensors is damaged .* Delete this file"):
            swept(tmp_path / "s")
    file.unlink()  # what the error says to do
    assert torch.equal(swept(tmp_path / "s").values, want.values)
    (tmp_path / "s" / "sweep.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        swept(tmp_path / "s")


def grids(path, **kwargs):
    given = {"site": "ssm_state", "metric": {"a": score, "b": third}, "positions": [-1, 3], "lengths": [40, 30, 35]}
    return patch_grid(MODEL, IDS, DONOR, path=path, progress=False, memory=MEMORY, **given | kwargs)


def same(one, two):
    for name in ("values", "base", "donor"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0, equal_nan=True)
    assert (one.site, one.layers, one.positions, one.parts) == (two.site, two.layers, two.positions, two.parts)
    assert (one.noising is None) == (two.noising is None)
    if one.noising is not None:
        same(one.noising, two.noising)


CASES = [
    {"both": True, "layers": [0, (1, 2)]},
    {"parts": bands(MODEL, 2), "source": "mean"},
    {"parts": {"first": {"e": [0, 3]}, "second": {"n": 2}}, "source": "noise", "std": 0.5, "seed": 3},
    {"site": "embed", "metric": score, "lengths": None},
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_saved_grid_comes_back_and_replays(tmp_path, case):
    kwargs = {"metric": {"a": score, "b": score}} | CASES[case]
    made = grids(tmp_path / "g", **kwargs)
    back = load_grid(tmp_path / "g")
    anew = replay(tmp_path / "g", MODEL, kwargs["metric"], progress=False)
    for found in (back, anew):
        if isinstance(made, dict):
            assert found.keys() == made.keys()
            for name, grid in made.items():
                same(grid, found[name])
        else:
            same(made, found)


def test_a_replay_that_is_not_the_same_raises(tmp_path):
    grids(tmp_path / "g", metric=score)
    with torch.no_grad():
        other = tiny(seed=6, dtype=torch.float32)
        other.lm_head.weight[3] += 1
    with pytest.raises(CheckpointError, match="made with another model"):
        replay(tmp_path / "g", other, score, progress=False)
    with pytest.raises(CheckpointError, match="values of 'metric' are not the same numbers"):
        replay(tmp_path / "g", MODEL, lambda logits: score(logits) + 1, progress=False)
    with pytest.raises(EditError, match=r"the source of .* was donor"):
        replay(tmp_path / "g", MODEL, score, source=Zero, progress=False)
    grids(tmp_path / "z", metric=score, source=Zero)
    same(replay(tmp_path / "z", MODEL, score, source=Zero, progress=False), load_grid(tmp_path / "z"))
    with pytest.raises(CheckpointError, match="holds no finished grid"):
        load_grid(tmp_path)
    file = tmp_path / "g" / "grid.safetensors"
    shutil.copy(tmp_path / "z" / "grid.safetensors", file)
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_grid(tmp_path / "g")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_grid(tmp_path / "g")
    assert json.loads((tmp_path / "g" / "sweep.json").read_text())["version"] == 1
