"""The files of a checkpoint: in a folder or of the hub, whole or in shards, broken or hostile."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import EMBEDDING, KINDS, LAYOUTS, same, shard
from helpers import tiny
from safetensors.torch import load_file, save_file

from minimal_mamba import Mamba
from minimal_mamba.errors import CheckpointError


def test_paths_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give a checkpoint's folder, or a hub id"):
        Mamba.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json; it holds nothing"):
        Mamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Mamba.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        Mamba.from_pretrained(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        Mamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny().config.to_mamba_ssm()))
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors.*it holds config\.json"):
        Mamba.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="revision='main' is for a hub id"):
        Mamba.from_pretrained(tmp_path, revision="main")


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["torch zip", "torch legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused(saved, how):
    (saved / "model.safetensors").unlink()
    file, touched = saved / "pytorch_model.bin", saved / "touched"
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({EMBEDDING: Payload(touched)}, protocol=2))
    else:
        torch.save({EMBEDDING: Payload(touched)}, file, _use_new_zipfile_serialization=how == "torch zip")
    with pytest.raises(CheckpointError, match="could run code, so it is refused"):
        Mamba.from_pretrained(saved)
    assert not touched.exists()
    torch.load(file, weights_only=False) if how != "plain pickle" else pickle.loads(file.read_bytes())
    assert touched.exists()  # the payload does work


def test_a_bin_from_before_zip_archives_loads(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, safetensors=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(Mamba.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("safetensors", KINDS)
@pytest.mark.parametrize("fault", ["truncated", "garbage", "empty"])
def test_a_broken_file_is_named(tmp_path, safetensors, fault):
    tiny().save_pretrained(tmp_path, safetensors=safetensors)
    file = tmp_path / KINDS[safetensors]
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "empty": b""}[fault])
    with pytest.raises(CheckpointError, match=f"{file.name} (cannot be read|is broken)"):
        Mamba.from_pretrained(tmp_path)


def test_a_bin_that_is_no_state_dict(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, safetensors=False)
    for wrong in ({"model": model.state_dict()}, {0: torch.ones(1)}, [torch.ones(1)]):
        torch.save(wrong, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="not a state dict"):
            Mamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("safetensors", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded(tmp_path, layout, safetensors):
    model = tiny(tie_embeddings=False)
    model.save_pretrained(tmp_path, layout=layout, safetensors=safetensors)
    shard(tmp_path, KINDS[safetensors])
    assert same(Mamba.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("escape", ["../{}", "{root}/{}", "sub/../../{}", "..", "", "..\\{}", "model.txt"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path, escape):
    folder = tmp_path / "checkpoint"
    tiny().save_pretrained(folder)
    shard(folder, "model.safetensors", n_files=1)
    index = folder / "model.safetensors.index.json"
    (name,) = set(json.loads(index.read_text())["weight_map"].values())
    os.rename(folder / name, tmp_path / name)
    (folder / "sub").mkdir()
    stray = escape.format(name, root=tmp_path)
    index.write_text(json.dumps({"weight_map": {"any": stray}}))
    with pytest.raises(CheckpointError, match="names the shard"):
        Mamba.from_pretrained(folder)


def test_a_broken_set_of_shards(saved):
    shard(saved, "model.safetensors")
    first, second = sorted(saved.glob("*-0000[12]-of-00003.safetensors"))
    whole = load_file(second)
    save_file(whole | dict(list(load_file(first).items())[:1]), second)
    with pytest.raises(CheckpointError, match="in another shard too"):
        Mamba.from_pretrained(saved)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"has no {second.name}"):
        Mamba.from_pretrained(saved)
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Mamba.from_pretrained(saved)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_hub_id_is_fetched_file_by_file(tmp_path, monkeypatch, kind):
    hub = pytest.importorskip("huggingface_hub")
    model, asked = tiny(), []
    model.save_pretrained(tmp_path, safetensors=kind == "model.safetensors")
    if kind.endswith(".json"):
        shard(tmp_path, "pytorch_model.bin")

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if not (tmp_path / name).exists():
            raise hub.utils.LocalEntryNotFoundError(f"no {name}")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(Mamba.from_pretrained("someone/mamba", revision="v1"), model)
    assert {(repo, revision) for repo, _, revision in asked} == {("someone/mamba", "v1")}
    assert asked[0][1] == "config.json"
    assert kind in [name for _, name, _ in asked]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.utils.LocalEntryNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"no folder some/one.*config\.json.*LocalEntry.*local cache.*network"):
        Mamba.from_pretrained("some/one")


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "some" / "one")
    monkeypatch.chdir(tmp_path)
    assert same(Mamba.from_pretrained("some/one"), tiny())
