"""Checkpoints written: in the names that others read, whole or not at all."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import EMBEDDING, HEAD, KINDS, same
from helpers import tiny
from safetensors.torch import load_file
from torch import nn

from minimal_mamba import Mamba, checkpoint
from minimal_mamba.errors import CheckpointError, ConfigError


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("safetensors", KINDS)
@pytest.mark.parametrize("at", ["weights", "half the weights", "config", "first move"])
def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch, safetensors, at):
    tiny().save_pretrained(tmp_path, safetensors=safetensors)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        if at == "half the weights":
            Path(args[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    if at in ("weights", "half the weights"):
        monkeypatch.setattr(checkpoint, "save_file", fail)
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(*{"config": (Path, "write_text"), "first move": (os, "replace")}[at], fail)
    with pytest.raises(OSError, match="no space"):
        tiny(seed=1, n_layer=2).save_pretrained(tmp_path, safetensors=safetensors)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("safetensors", KINDS)
def test_the_config_comes_last(tmp_path, monkeypatch, safetensors):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    tiny().save_pretrained(tmp_path, safetensors=safetensors)
    assert moved == [KINDS[safetensors], "config.json"]


def test_saving_again_replaces_and_others_can_read(saved):
    model = tiny(seed=1, n_layer=2)
    model.save_pretrained(saved)
    assert same(Mamba.from_pretrained(saved), model)
    (saved / "probe").touch()
    usual = (saved / "probe").stat().st_mode
    assert {file.stat().st_mode for file in saved.iterdir()} == {usual}


def test_weights_in_another_file_are_not_left_to_chance(saved):
    before = contents(saved)
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors beside pytorch_model\.bin"):
        tiny(seed=1).save_pretrained(saved, safetensors=False)
    assert contents(saved) == before


def test_a_tied_model_whose_head_was_replaced_is_not_saved(saved):
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(CheckpointError, match="tied"):
        model.save_pretrained(saved)
    assert same(Mamba.from_pretrained(saved), tiny())


def test_what_is_no_path_is_refused(saved):
    for wrong in (None, 3, b"x"):
        for call in (Mamba.from_pretrained, tiny().save_pretrained):
            with pytest.raises(CheckpointError, match=r"path=.* is no path; give a folder"):
                call(wrong)
    for file in (saved / "config.json", saved / "config.json" / "under"):
        with pytest.raises(CheckpointError, match="is a file, or in one; give a folder"):
            tiny().save_pretrained(file)
    assert same(Mamba.from_pretrained(saved), tiny())


def test_the_names_of_the_tensors_are_upstreams(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "bin", safetensors=False)
    bin_names = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True).keys()
    assert {EMBEDDING, HEAD} <= bin_names  # mamba-ssm loads strictly, head included
    model.save_pretrained(tmp_path / "hf", layout="hf")
    hf_names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert "backbone.embeddings.weight" in hf_names
    assert not {EMBEDDING, HEAD} & hf_names


def test_hf_loads_ours_with_all_keys_matched(tmp_path):
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        model = tiny(tie_embeddings=tied, dtype=torch.float32)
        model.save_pretrained(tmp_path / str(tied), layout="hf")
        theirs, info = transformers.MambaForCausalLM.from_pretrained(tmp_path / str(tied), output_loading_info=True)
        assert not any(info.values()), info
        ids = torch.arange(14).reshape(2, 7)
        with torch.no_grad():
            ours = model(ids).logits
            assert (ours - theirs(ids).logits).norm() / ours.norm() < 1e-5
        for name, tensor in theirs.state_dict().items():  # HF divides out_proj once more if rescale_prenorm_residual
            assert torch.equal(tensor, model.state_dict()[name.replace("embeddings.", "embedding.")]), name
        theirs.save_pretrained(tmp_path / f"{tied} back", max_shard_size="3KB")  # HF's own shards
        assert (tmp_path / f"{tied} back" / "model.safetensors.index.json").exists()
        assert same(Mamba.from_pretrained(tmp_path / f"{tied} back"), model)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="layout='HF' is unknown; 'mamba_ssm' and 'hf' are"):
        tiny().save_pretrained(tmp_path / "new", layout="HF")
    assert not (tmp_path / "new").exists()


def test_the_mamba_ssm_layout_cannot_hold_a_norm_eps(tmp_path):
    with pytest.raises(ConfigError, match=r"norm_eps=0\.001"):
        tiny(norm_eps=1e-3).save_pretrained(tmp_path / "new")
    tiny(norm_eps=1e-3).save_pretrained(tmp_path, layout="hf")
    assert Mamba.from_pretrained(tmp_path).config.norm_eps == 1e-3
