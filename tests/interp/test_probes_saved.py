"""A grid of probes on disk: interrupted, it goes on to the same numbers; what is another grid is refused."""

import importlib
from dataclasses import fields

import pytest
import torch
from helpers import tiny

from interp import Zero, at, probe_grid, sweep
from interp.linear_probe import LinearProbe
from minimal_mamba.errors import CheckpointError, InputError

MODEL = tiny(seed=9)
IDS = torch.randint(0, 29, (40, 4), generator=torch.Generator().manual_seed(0))
LABELS = {"classes": IDS[:, 0] % 3, "bools": IDS[:, 0] > 12, "numbers": IDS[:, :1].double().expand(40, 4) / 7}


def grid(path=None, labels="classes", model=MODEL, ids=IDS, **given):
    options = {"site": "y", "positions": [1, (0, -1)], "seeds": 1, "folds": 3, "random_model": tiny(seed=10)} | given
    labels = LABELS[labels] if isinstance(labels, str) else labels
    return probe_grid(model, ids, labels, progress=False, path=path, **options)


def same(one, two):
    assert (one.site, one.layers, one.positions) == (two.site, two.layers, two.positions)
    for a, b in zip(sum(one.probes, ()), sum(two.probes, ()), strict=True):
        for f in fields(LinearProbe):
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert type(x) is type(y)
            assert torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y, f.name
        assert [*a.controls] == [*b.controls] and [*map(type, a.classes or ())] == [*map(type, b.classes or ())]


@pytest.mark.parametrize("room", [1 << 30, 1])
@pytest.mark.parametrize("labels", LABELS)
def test_an_interrupted_grid_goes_on_to_the_same_bits(tmp_path, monkeypatch, labels, room):
    module = importlib.import_module("interp.probes")
    monkeypatch.setattr(module, "MEMORY", room)
    want, probe, collect, fitted, runs = grid(labels=labels), module.probe, module.collect, [], []

    def counted(*args, **given):
        if len(fitted) == limit:
            raise KeyboardInterrupt
        fitted.append(1)
        return probe(*args, **given)

    monkeypatch.setattr(module, "probe", counted)
    monkeypatch.setattr(module, "collect", lambda *args, **given: runs.append(1) or collect(*args, **given))
    limit = 3  # in the middle of the second layer
    with pytest.raises(KeyboardInterrupt):
        grid(tmp_path, labels)
    assert len([*tmp_path.glob("group-*")]) == 3
    fitted.clear()
    limit = None
    same(grid(tmp_path, labels), want)
    assert len(fitted) == 3  # of the 6, what was done is not done again
    fitted.clear()
    runs.clear()
    same(grid(tmp_path, labels), want)
    assert not fitted and not runs


def test_another_grid_is_refused(tmp_path, monkeypatch):
    grid(tmp_path, layers=0)
    odd = IDS.clone()
    odd[3, 0] += 1
    groups = torch.arange(40) // 2
    changed = {
        "model": {"model": tiny(seed=8)},
        "random_model": {"random_model": tiny(seed=8)},
        "ids": {"ids": odd, "labels": LABELS["classes"]},
        "labels": {"labels": "bools"},
        "groups": {"groups": groups},
        "site": {"site": "u"},
        "layers": {"layers": 1},
        "positions": {"positions": [1, (1, -1)]},
        "lengths": {"lengths": [4] * 39 + [3]},
        "options": {"dims": 7},
        "batch": {"batch": 7},
        "backend": {"backend": "reference"},
    }
    for what, given in changed.items():
        with pytest.raises(CheckpointError, match=f"holds another probe_grid: they differ in .*{what}"):
            grid(tmp_path, **({"layers": 0} | given))
    with pytest.raises(CheckpointError, match="differ in options"):
        grid(tmp_path, layers=0, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        with pytest.raises(CheckpointError, match="differ in torch"):
            grid(tmp_path, layers=0)
    same(grid(tmp_path, layers=0, dims=64), grid(layers=0))  # the default, said
    with pytest.raises(CheckpointError, match=r"holds other files and no sweep\.json"):
        sweep(MODEL, IDS, [], lambda x: x[:, -1, 0], path=tmp_path, progress=False)
    file = sorted(tmp_path.glob("group-*"))[1]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"group-00001\.safetensors is damaged .* Delete this file"):
        grid(tmp_path, layers=0)
    file.unlink()
    same(grid(tmp_path, layers=0), grid(layers=0))


def test_what_is_refused_leaves_the_folder_free(tmp_path):
    with pytest.raises(InputError):
        grid(tmp_path, seeds=-1)

    def fails(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(MODEL, IDS, [Zero(at.y(layer=0, pos=0))], fails, progress=False, path=tmp_path)
    assert not [*tmp_path.iterdir()]
    same(grid(tmp_path), grid())
