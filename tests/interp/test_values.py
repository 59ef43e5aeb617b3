"""Edits are values: compared by content, printed, copied when made, saved whole and loaded equal."""

import dataclasses
import functools
import json
import os

import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from interp import Add, Apply, Mean, Project, Scale, Set, Zero, at, load_edits, run, save_edits
from minimal_mamba.edits import KINDS
from minimal_mamba.errors import CheckpointError, EditError, MambascopeError

PLACE = at.ssm_state(layer=1, pos=[2, -1], e=slice(3, None))
VALUE = torch.arange(8.0, dtype=torch.float64).reshape(2, 4) + 0.1
VALUED = [Set, Add, Scale, Mean, Project]


def one_of_each(place=PLACE, value=VALUE):
    return [
        Set(place, value),
        Add(place, value.float(), rows=[2, 0]),
        Scale(place, 0.1),
        Zero(place, rows=slice(1, None)),
        Mean(place),
        Mean(place, value, rows=1),
        Project(place, value),
        Project(place, value, keep=True),
        Apply(at.u(layer=0, pos=slice(None, None, 2)), F.softsign),
        Apply(at.embed(pos=-1), json.dumps, rows=[0]),  # any function that can be imported
    ]


def test_all_kinds_are_here():
    assert {type(e).__name__ for e in one_of_each()} == set(KINDS)


def test_equal_by_content_and_hashable():
    one, two = one_of_each(), one_of_each()
    for i, a in enumerate(one):
        assert a == two[i]
        assert hash(a) == hash(two[i])
        assert all(a != b for j, b in enumerate(two) if j != i)
    assert len(set(one + two)) == len(one)
    for kind in VALUED:
        assert kind(PLACE, VALUE) != kind(PLACE, VALUE + 1e-12)
        assert kind(PLACE, VALUE) != kind(at.ssm_state(layer=1), VALUE)
    assert Set(PLACE, VALUE) != Add(PLACE, VALUE)
    assert Set(PLACE, VALUE, rows=0) == Set(PLACE, VALUE, rows=[0])
    assert Set(PLACE, VALUE, rows=0) != Set(PLACE, VALUE)
    assert Set(PLACE, VALUE) != "Set"
    assert Mean(PLACE) != Mean(PLACE, VALUE)


def test_printed_so_that_a_person_can_read_it():
    for show in (str, repr):
        assert show(Set(PLACE, VALUE)) == "Set(ssm_state(layer=1, pos=[2, -1], e=3:), value (2, 4))"
        assert show(Zero(at.embed(pos=slice(1, 9, 2)), rows=[0, 2])) == "Zero(embed(pos=1:9:2), rows=[0, 2])"
        assert (
            show(Project(PLACE, VALUE, keep=True))
            == "Project(ssm_state(layer=1, pos=[2, -1], e=3:), value (2, 4), keep=True)"
        )
        assert "softsign" in show(Apply(PLACE, F.softsign))


def test_frozen():
    for edit in one_of_each():
        for name in [f.name for f in dataclasses.fields(edit)]:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(edit, name, None)


@pytest.mark.parametrize("kind", VALUED)
def test_copied_when_made(kind):
    given = VALUE.clone()
    edit = kind(PLACE, given)
    given.fill_(99)
    assert edit == kind(PLACE, VALUE)


def test_the_donor_may_change_after_the_edit_was_made():
    model, ids = tiny(), torch.tensor([[3, 4, 5, 6]])
    place = at.ssm_state(layer=1, pos=2)
    donor = run(model, ids.flip(1), record=[place])[place].detach()
    edit = Set(place, donor)
    before = run(model, ids, [edit]).logits
    donor.zero_()
    assert torch.equal(run(model, ids, [edit]).logits, before)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_a_run_returns_is_not_the_edits_own_tensor(backend):
    model, ids = tiny(), torch.tensor([[3, 4, 5, 6]])
    edits = [Set(at.ssm_state(pos=-1), 0.5), Mean(at.conv_state(pos=-1), 0.25), Set(at.logits(), 2.0)]
    with torch.no_grad():
        out = run(model, ids, edits, keep_state=True, backend=backend)
    for tensor in (*out.state.ssm_state, *out.state.conv_state, out.logits):
        tensor += 7
    assert [float(e.value) for e in edits] == [0.5, 0.25, 2.0]


def test_python_numbers_keep_their_64_bits():
    assert Scale(PLACE, 0.1).factor.item() == 0.1
    assert Set(PLACE, [[0.1, 0.7]]).to.tolist() == [[0.1, 0.7]]
    assert Set(PLACE, 1).to.is_floating_point()
    assert Set(PLACE, torch.tensor([1, 2])).to.is_floating_point()


@pytest.mark.parametrize("kind", VALUED)
def test_nan_raises_when_made(kind):
    bad = VALUE.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(EditError, match=rf"{kind.__name__}\(ssm_state.*the value holds NaN \(1 of 8 numbers\)"):
        kind(PLACE, bad)


def test_a_list_of_tensors_keeps_their_gradients():
    leaf = torch.ones(2, requires_grad=True)
    edit = Set(PLACE, [leaf, leaf * 2])
    assert edit == Set(PLACE, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    (grad,) = torch.autograd.grad(edit.to.sum(), leaf)
    assert grad.tolist() == [3, 3]


def test_what_is_no_edit_raises_when_made():
    with pytest.raises(EditError, match=r"'u' is no address; make one with at\.<site>"):
        Zero("u")
    with pytest.raises(EditError, match="with m linearly independent directions"):
        Project(PLACE, torch.ones(2, 4))
    for make in (lambda a: Project(a, VALUE), lambda a: Apply(a, F.softsign)):
        with pytest.raises(EditError, match="recurrent_state is two sites"):
            make(at.recurrent_state(layer=0, pos=1))


# -- on disk ------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    edits = one_of_each()
    save_edits(edits, tmp_path / "new" / "folder")
    back = load_edits(tmp_path / "new" / "folder")
    assert back == edits
    assert [e.value.dtype for e in back if e.value is not None] == [e.value.dtype for e in edits if e.value is not None]
    assert back[8].fn is F.softsign
    assert back[9].fn is json.dumps
    save_edits([], tmp_path)
    assert load_edits(tmp_path) == []


def test_what_is_loaded_does_the_same(tmp_path):
    model, ids = tiny(), torch.tensor([[3, 4, 5, 6], [6, 5, 4, 3]])
    place = at.ssm_state(layer=[2, 0], pos=slice(1, None), e=[4, 2])
    shape = run(model, ids, record=[place])[place].shape
    edits = [
        Set(place, torch.randn(shape, dtype=torch.float64).requires_grad_()),
        Apply(at.u(layer=1), F.softsign, rows=[1]),
    ]
    save_edits(edits, tmp_path)
    assert torch.equal(run(model, ids, load_edits(tmp_path)).logits, run(model, ids, edits).logits)


def test_functions_without_a_name_raise_when_saved(tmp_path):
    def local(x):
        return x

    for fn in (local, lambda x: x, tiny().forward, torch.relu, functools.partial(F.softplus, beta=2.0)):
        says = (
            r"cannot be imported by name\. Move it to the top level.*torch\.nn\.functional\.relu, or wrap it.*partial"
        )
        with pytest.raises(EditError, match=says):
            save_edits([Apply(PLACE, fn)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [1, 2])
def test_never_half_written(tmp_path, monkeypatch, fails):
    """A disk that is full at the first or at the second file."""
    old, new = [Set(PLACE, VALUE)], [Set(PLACE, VALUE * 2)]
    save_edits(old, tmp_path)
    calls, whole = [], os.replace

    def replace(*args):
        calls.append(args)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        whole(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        save_edits(new, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits.json", "edits.safetensors"]
    if fails == 1:
        assert load_edits(tmp_path) == old
    else:  # the new values stand beside the old description: that is no set of edits
        with pytest.raises(CheckpointError, match=r"not the file that edits\.json was saved with"):
            load_edits(tmp_path)


def test_loading_what_is_not_there_or_junk(tmp_path):
    with pytest.raises(CheckpointError, match="holds no saved edits"):
        load_edits(tmp_path)
    edits = [Set(PLACE, VALUE), Apply(at.u(), F.softsign)]
    save_edits(edits, tmp_path)
    text, data = (tmp_path / "edits.json").read_text(), (tmp_path / "edits.safetensors").read_bytes()

    def broken(json_text, values, match):
        (tmp_path / "edits.json").write_text(json_text)
        (tmp_path / "edits.safetensors").write_bytes(values)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_edits(tmp_path)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, MambascopeError)
        assert str(tmp_path) in str(caught.value)

    broken(text[: len(text) // 2], data, "holds no saved edits")
    broken("[]", data, "holds no saved edits")
    broken("{}", data, "holds no saved edits")
    broken("\x00\x01", data, "holds no saved edits")
    broken(text, b"junk", "not the file")
    broken(text, data[:-1], "not the file")
    broken(text, data[:-1] + bytes([data[-1] ^ 1]), "not the file")
    broken(text.replace('"version": 1', '"version": 2'), data, "has version 2; this mambascope reads version 1")
    broken(text.replace('"kind": "Set"', '"kind": "Put"'), data, "edit 0 cannot be made here.*Put")
    broken(text.replace('"site": "u"', '"site": "w"'), data, "edit 1 cannot be made here")
    broken(text.replace(":softsign", ":softsignn"), data, "edit 1 cannot be made here.*softsignn")
    broken(text.replace("torch", "torchh"), data, "edit 1 cannot be made here")
    (tmp_path / "edits.json").write_text(text)
    (tmp_path / "edits.safetensors").write_bytes(data)
    assert load_edits(tmp_path) == edits
