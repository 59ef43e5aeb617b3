"""What the tests of checkpoints share: folders with weights in them, and changes to what they hold."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

LAYOUTS = ["mamba_ssm", "hf"]
KINDS = {True: "model.safetensors", False: "pytorch_model.bin"}
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def same(found: nn.Module, want: nn.Module) -> bool:
    """Every tensor bit-equal, of the same type."""
    a, b = found.state_dict(), want.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a folder's model.safetensors."""
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def reconfigure(folder: Path, **changes) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def shard(folder: Path, name: str, n_files: int = 3) -> Path:
    """Split the weights file `name` into shards with an index."""
    binary = name.endswith(".bin")
    tensors = torch.load(folder / name, weights_only=True) if binary else load_file(folder / name)
    weight_map = {}
    for i in range(n_files):
        part = {key: tensors[key].clone() for key in list(tensors)[i::n_files]}
        file = f"{name.split('.')[0]}-{i + 1:05}-of-{n_files:05}{Path(name).suffix}"
        torch.save(part, folder / file) if binary else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / name).unlink()
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
