"""Checkpoints: read and write the two layouts that Mamba-1 weights come in, and take over live modules.

    layout      config.json           weights                                          the embedding's name
    mamba_ssm   ssm_cfg, d_model      pytorch_model.bin or model.safetensors           backbone.embedding.weight
    hf          model_type = mamba    model.safetensors or pytorch_model.bin           backbone.embeddings.weight

Nothing else differs; FalconMamba has HF's layout, with model_type = falcon_mamba, and its norms inside the mixer no
weights. Either may be in shards, with an index beside them. Two more are told by their names: what a wrapper saved,
with `module.` or `model.` before each; and a base model, the backbone alone without `backbone.`, which is read if its
head is tied. Nothing else is renamed.
"""

import dataclasses
import json
import os
import pickle
import re
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .block import wide
from .config import HF_TYPES, MambaConfig
from .errors import CheckpointError, ConfigError
from .files import make_folder, write_files
from .model import Mamba

EMBEDDING, HF_EMBEDDING, HEAD = "backbone.embedding.weight", "backbone.embeddings.weight", "lm_head.weight"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OF_ANY_TYPE = (".A_log", ".D", ".dt_proj.bias", "norm.bias", "norm_f.bias")  # the forward casts them

Find = Callable[[str], Path]  # a checkpoint's file by its name, or CheckpointError


def load(
    path: str | Path,
    *,
    n_layer: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> Mamba:
    """Load a checkpoint of either layout.

    Args:
        path: a folder, or, where there is no such folder, a hub id `owner/name`. Of several weight files the first of
            `WEIGHTS` is taken.
        n_layer: keep the first layers only, 1..all. None: all.
        dtype: type of the weights; A_log and D stay in float32 or wider, as mamba-ssm keeps them. None: each tensor
            in the type that it is stored in, which is one for all but A_log, D and the biases of dt_proj and of norms.
        device: where the model goes; None: the CPU.
        revision: of the hub id: a branch, a tag or a commit.
    Returns:
        The model in evaluation mode, independent of the files. Every parameter requires a gradient. NaN and inf are
        loaded as they are.
    Raises:
        ConfigError: a configuration that this model does not implement, an n_layer that the checkpoint has not, or a
            device that is not here.
        CheckpointError: files that are not there or cannot be read; tensors missing, left over or misshapen, or of
            types that cannot run; a tied head that is not the embedding; a pickle that holds more than tensors, which
            is not run.
    Cost: one copy of the kept tensors; the random generators stay where they are.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # which, depends on the device
        why = textwrap.shorten(str(error), 200)
        raise ConfigError(f"device={device!r} cannot be used here ({why}); 'cpu' can.") from error
    find = _finder(path, revision)
    config = MambaConfig.from_dict(_read_json(find("config.json")))
    tensors = _read_weights(_first(find, WEIGHTS), find)
    return _assemble(config, tensors, str(path), n_layer, dtype, device)


def from_module(module: nn.Module, *, n_layer: int | None = None) -> Mamba:
    """Copy a live model, in its types and on its device: transformers' `MambaForCausalLM` or `FalconMambaForCausalLM`,
    or mamba-ssm's `MambaLMHeadModel`.

    Args:
        module: told by its config, so neither library is imported. n_layer: keep the first layers only.
    Raises:
        ConfigError, CheckpointError: as `load`.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile was given
    kind = type(module).__name__
    config: Any = getattr(module, "config", None)
    is_lm = isinstance(module, nn.Module) and hasattr(module, "lm_head")
    if is_lm and getattr(config, "model_type", None) in HF_TYPES:
        raw = config.to_dict()
    elif is_lm and dataclasses.is_dataclass(config) and not isinstance(config, type) and hasattr(config, "ssm_cfg"):
        raw = dataclasses.asdict(config)
    else:
        raise CheckpointError(
            f"from_module was given a {kind}; it takes transformers' MambaForCausalLM and FalconMambaForCausalLM, and "
            "mamba-ssm's MambaLMHeadModel."
        )
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise CheckpointError(
            f"from_module was given a {kind} on the meta device, where tensors hold no numbers. Load its weights first."
        )
    return _assemble(MambaConfig.from_dict(raw), module.state_dict(), f"the live {kind}", n_layer, None, None)


def save(model: Mamba, path: str | Path, *, layout: str = "mamba_ssm", safetensors: bool = True) -> None:
    """Write `config.json` and the weights into a folder, which is made if need be.

    Both files are written beside their places and moved there when both are whole, the config last: a failed write
    leaves the folder as it was.

    Args:
        layout: "mamba_ssm", or "hf" for transformers' `AutoModelForCausalLM.from_pretrained`, the only one that a
            FalconMamba has. Neither keeps every field of the config: "mamba_ssm" leaves out `initializer_range` and
            `rescale_prenorm_residual`, which matter when weights are drawn; "hf" has no padded vocabulary, so that 29
            tokens in 32 rows come back as 32 tokens.
        safetensors: `model.safetensors`, without a tied head; else `pytorch_model.bin`, with it, which is what
            mamba-ssm's own `from_pretrained` reads.
    Raises:
        ConfigError: a choice that the layout has no field for.
        CheckpointError: an unknown layout; a head that the config says is tied and is not; a folder with weights in
            another file, since it would be open which of the two a reader takes; a path that is none, or a file's.
    """
    layouts = {"mamba_ssm": model.config.to_mamba_ssm, "hf": model.config.to_hf}
    if layout not in layouts:
        raise CheckpointError(f"layout={layout!r} is unknown; {' and '.join(map(repr, layouts))} are.")
    raw = layouts[layout]()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        _check_tied(tensors, "this model")
        tensors[HEAD] = tensors[EMBEDDING]
    if layout == "hf":
        raw["dtype"] = str(model.dtype).removeprefix("torch.")
        tensors = under(HF_EMBEDDING, tensors)
    if safetensors and model.config.tie_embeddings:
        del tensors[HEAD]

    folder, name = make_folder(_path(path)), "model.safetensors" if safetensors else "pytorch_model.bin"
    others = [other for other in WEIGHTS if other != name and (folder / other).exists()]
    if others:
        raise CheckpointError(f"{folder} already holds {', '.join(others)} beside {name}. Remove it or save elsewhere.")

    def write_weights(file: Path) -> None:
        if safetensors:
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            torch.save(tensors, file)

    def write_config(file: Path) -> None:
        file.write_text(json.dumps(raw, indent=2) + "\n")

    write_files(folder, {name: write_weights, "config.json": write_config})


def _path(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"path={path!r:.80} is no path; give a folder, as a str or a Path.")
    return Path(path)


def _finder(path: str | Path, revision: str | None) -> Find:
    folder = _path(path)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for a hub id; {folder} is a folder.")
        return lambda name: _in_folder(folder, name)
    if isinstance(path, str) and not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return lambda name: _in_hub(path, name, revision)
    what = "is a file" if folder.exists() else "does not exist"
    raise CheckpointError(f"{folder} {what}; give a checkpoint's folder, or a hub id owner/name.")


def _in_folder(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        there = sorted(file.name for file in folder.iterdir())
        raise CheckpointError(f"{folder} has no {name}; it holds {', '.join(there[:8]) or 'nothing'}.")
    return folder / name


def _in_hub(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # only here: it takes long to import

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # of the hub, of HTTP and of the disk; the hub's library changes which
        raise CheckpointError(
            f"There is no folder {repo}, and {name} of the hub's {repo} ({revision or 'main'}) cannot be had: "
            f"{type(error).__name__}: {textwrap.shorten(str(error), 300)} "
            "Check the name and the network, or fetch the files elsewhere and give their folder."
        ) from error


def _first(find: Find, names: tuple[str, ...]) -> Path:
    """The first of the files that is there."""
    for name in names:
        try:
            return find(name)
        except CheckpointError as error:
            last = error
    raise CheckpointError(f"No weights: none of {', '.join(names)} is there. {last}") from last


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a {type(raw).__name__}, not an object with keys.")
    return raw


def _read_weights(file: Path, find: Find) -> dict[str, Tensor]:
    """The tensors of one file, or of all shards that an index names."""
    if file.suffix != ".json":
        return _read_tensors(file)
    shards = _read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{file} has no weight_map from tensor names to file names.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
            raise CheckpointError(f"{file} names the shard {name!r}; it takes .safetensors or .bin files beside it.")
        shard = _read_tensors(find(name))
        if twice := sorted(shard.keys() & tensors.keys()):
            raise CheckpointError(f"{file}: {', '.join(twice[:8])} in {name} and in another shard too.")
        tensors |= shard
    return tensors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # torch maps zip archives only, not files from before torch 1.6
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        why = "is broken, or holds more than tensors: to load it could run code, so it is refused"
        raise CheckpointError(f"{file} {why}.") from error
    except Exception as error:  # a broken file can raise anything
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}). Fetch it again.") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{file} is not a state dict: a flat dict of tensors by name.")
    return tensors


def _check_tied(tensors: Mapping[str, Tensor], source: str) -> None:
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head is not embedding and not bool(((head == embedding) | (head.isnan() & embedding.isnan())).all()):
        raise CheckpointError(f"{source}: {HEAD} differs from {EMBEDDING}, but the config says that they are tied.")


def _check_types(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError for types, or a mixture of them, that the forward cannot run."""
    kinds: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES or not name.endswith(OF_ANY_TYPE):
            kinds.setdefault(tensor.dtype, []).append(name)
    if len(kinds) > 1 or not kinds.keys() <= {*TYPES}:
        found = " and ".join(f"{dtype} ({len(names)}, such as {names[0]})" for dtype, names in kinds.items())
        raise CheckpointError(
            f"{source}: the tensors are {found}. The model runs in one type, float16, bfloat16, float32 or float64; "
            "only A_log, D and the biases of dt_proj and of norms may have another of these. Load them with dtype=, or "
            "change the live module with .to(dtype)."
        )


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefix, if a wrapper's module has put one before all their names."""
    prefix = next((p for p in ("module.", "model.") if all(name.startswith(p) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the embedding under this one of its two names."""
    other = HF_EMBEDDING if name == EMBEDDING else EMBEDDING
    return {name if key == other and name not in tensors else key: tensor for key, tensor in tensors.items()}


def _renamed(tensors: Mapping[str, Tensor], tied: bool, source: str) -> dict[str, Tensor]:
    """The tensors under mamba-ssm's names, as far as they are told by their prefixes."""
    found = unwrapped(tensors)
    if found and all(name.startswith(("embedding.", "embeddings.", "layers.", "norm_f.")) for name in found):
        if not tied:
            raise CheckpointError(
                f"{source} is a base model, and its config says that the head is not tied to the embedding, so "
                f"{HEAD} is missing. Save the whole MambaForCausalLM."
            )
        found = {f"backbone.{name}": tensor for name, tensor in found.items()}
    return under(EMBEDDING, found)


def _assemble(
    config: MambaConfig,
    tensors: Mapping[str, Tensor],
    source: str,
    n_layer: int | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Mamba:
    """A model with copies of the tensors, which must be exactly those that the config asks for."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is no torch.dtype; pass one, such as torch.float32.")
    if dtype is not None and dtype not in TYPES:
        raise CheckpointError(f"dtype={dtype}: weights are floating-point, of {', '.join(map(str, TYPES))}.")
    dropped: tuple[str, ...] = ()
    if n_layer is not None:
        whole, config = config.n_layer, dataclasses.replace(config, n_layer=n_layer)
        if n_layer > whole:
            raise ConfigError(f"n_layer={n_layer}: {source} has {whole} layers; keep 1..{whole}.")
        dropped = tuple(f"backbone.layers.{i}." for i in range(n_layer, whole))
    with torch.device("meta"):  # shapes and names without weights, and without a draw from the generators
        model = Mamba(config)
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    named = _renamed(tensors, config.tie_embeddings, source)
    found = {name: tensor for name, tensor in named.items() if not name.startswith(dropped)}
    if config.tie_embeddings and EMBEDDING in found:
        found.setdefault(HEAD, found[EMBEDDING])
    missing = [f"{name} {shape} missing" for name, shape in want.items() if name not in found]
    unexpected = [f"{name} unexpected" for name in found if name not in want]
    misfits = []
    for name, tensor in found.items():
        if name in want and tuple(tensor.shape) != want[name]:
            misfits.append(f"{name} is {tuple(tensor.shape)}, not {want[name]}")
        elif name in want and not tensor.is_floating_point():
            misfits.append(f"{name} is {tensor.dtype}, not floating-point")
    # in turn, so that of names that do not fit both sides are shown
    faults = [fault for row in zip_longest(missing, unexpected, misfits) for fault in row if fault]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{source}: the tensors do not fit the config: {'; '.join(faults[:8])}{more}.")
    if config.tie_embeddings:
        _check_tied(found, source)
        del found[HEAD]
    if dtype is None:
        _check_types(found, source)

    def copy(name: str, tensor: Tensor) -> Tensor:
        own = dtype
        if dtype is not None and name.endswith((".A_log", ".D")):
            own = wide(dtype)
        return tensor.detach().to(device, own, copy=True, memory_format=torch.contiguous_format)

    model.load_state_dict({name: copy(name, tensor) for name, tensor in found.items()}, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    return model.eval()
