"""Checkpoints: bit-equal round trips, strictness, and files that are whole or not there."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from torch import nn

from minimal_mamba import Mamba, checkpoint
from minimal_mamba.errors import CheckpointError, ConfigError

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


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


# round trips


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("safetensors", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path, layout, safetensors, tied):
    model = tiny(tie_embeddings=tied, bias=True, conv_bias=False)
    model.save_pretrained(tmp_path, layout=layout, safetensors=safetensors)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", KINDS[safetensors]]
    back = Mamba.from_pretrained(tmp_path)
    assert same(back, model)
    assert back.config.padded_vocab == 32
    assert (back.lm_head.weight is back.backbone.embedding.weight) == tied
    assert all(p.requires_grad and p.is_leaf for p in back.parameters())
    if layout == "mamba_ssm":
        assert back.config == model.config


def test_layernorm_and_its_bias_round_trip(tmp_path):
    model = tiny(rms_norm=False)
    model.save_pretrained(tmp_path)
    assert same(Mamba.from_pretrained(tmp_path), model)
    with pytest.raises(ConfigError, match="RMSNorm only"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


def test_the_names_of_the_tensors_are_upstreams(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "bin", safetensors=False)
    bin_names = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True).keys()
    assert {EMBEDDING, HEAD} <= bin_names  # mamba-ssm loads strictly, head included
    model.save_pretrained(tmp_path / "hf", layout="hf")
    hf_names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert "backbone.embeddings.weight" in hf_names
    assert not {EMBEDDING, HEAD} & hf_names


@pytest.mark.parametrize("safetensors", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded(tmp_path, layout, safetensors):
    model = tiny(tie_embeddings=False)
    model.save_pretrained(tmp_path, layout=layout, safetensors=safetensors)
    shard(tmp_path, KINDS[safetensors])
    assert same(Mamba.from_pretrained(tmp_path), model)


def test_loading_leaves_the_random_generator_alone(saved):
    before = torch.get_rng_state()
    Mamba.from_pretrained(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loaded_model_does_not_depend_on_its_files(saved):
    model = Mamba.from_pretrained(saved)
    assert not model.training
    want = {k: v.clone() for k, v in model.state_dict().items()}
    with open(saved / "model.safetensors", "r+b") as file:  # in place, as a careless copy would
        size = os.fstat(file.fileno()).st_size
        file.write(bytes(size))
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


def test_nan_is_loaded_as_it_is(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.backbone.embedding.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path, safetensors=False)
    assert Mamba.from_pretrained(tmp_path).lm_head.weight[0, 0].isnan()


# transformers


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_module_copies_a_live_hf_model(dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=12, num_hidden_layers=2, vocab_size=32, state_size=5, conv_kernel=3)
    theirs = transformers.MambaForCausalLM(config).to(dtype)
    ours = Mamba.from_module(theirs)
    assert same(Mamba.from_module(torch.compile(theirs)), ours)
    want = {k.replace("embeddings.", "embedding."): v.clone() for k, v in theirs.state_dict().items()}
    assert ours.lm_head.weight is ours.backbone.embedding.weight
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    found = ours.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) and found[k].dtype == dtype for k in want)
    assert len(Mamba.from_module(theirs, n_layer=1).backbone.layers) == 1


@dataclasses.dataclass
class UpstreamConfig:
    """mamba_ssm.models.config_mamba.MambaConfig @ e9594ce."""

    d_model: int = 12
    d_intermediate: int = 0
    n_layer: int = 3
    vocab_size: int = 29
    ssm_cfg: dict = dataclasses.field(default_factory=lambda: {"d_state": 5, "d_conv": 3, "dt_rank": 4})
    attn_layer_idx: list = dataclasses.field(default_factory=list)
    attn_cfg: dict = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def test_from_module_copies_a_live_mamba_ssm_model():
    upstream = tiny()  # mamba-ssm's modules have these names
    upstream.config = UpstreamConfig()
    ours = Mamba.from_module(upstream)
    assert same(ours, upstream)
    assert ours.config == tiny().config
    assert ours.backbone.norm_f.weight is not upstream.backbone.norm_f.weight
    upstream.config = UpstreamConfig(attn_layer_idx=[1])
    with pytest.raises(ConfigError, match="attn_layer_idx"):
        Mamba.from_module(upstream)


def test_from_module_says_what_it_takes():
    for wrong in (nn.Linear(2, 2), tiny(), UpstreamConfig(), None):
        with pytest.raises(CheckpointError, match=f"{type(wrong).__name__}.*MambaForCausalLM.*MambaLMHeadModel"):
            Mamba.from_module(wrong)
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 5}
    with pytest.raises(CheckpointError, match="MambaModel; it takes"):  # no language-model head
        Mamba.from_module(transformers.MambaModel(transformers.MambaConfig(**sizes)))
    other = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**sizes))
    with pytest.raises(CheckpointError, match="FalconMamba"):
        Mamba.from_module(other)


# layers, types


def test_the_first_layers_only(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, layout="hf")
    two = Mamba.from_pretrained(tmp_path, n_layer=2)
    assert two.config.n_layer == len(two.backbone.layers) == 2
    want = {k: v for k, v in model.state_dict().items() if ".layers.2." not in k}
    assert two.state_dict().keys() == want.keys()
    assert all(torch.equal(two.state_dict()[k], v) for k, v in want.items())
    assert same(Mamba.from_pretrained(tmp_path, n_layer=3), model)
    with pytest.raises(ConfigError, match=r"n_layer=4.*has 3 layers; keep 1\.\.3"):
        Mamba.from_pretrained(tmp_path, n_layer=4)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=f"n_layer={wrong}"):
            Mamba.from_pretrained(tmp_path, n_layer=wrong)


def test_layers_beyond_the_config_are_unexpected(saved):
    """Only the layers that n_layer= drops are forgiven, not those that the config does not know of."""
    reconfigure(saved, n_layer=2)
    for n_layer in (None, 1):
        with pytest.raises(CheckpointError, match=r"layers\.2\.\S+ unexpected.*; and 2 more"):
            Mamba.from_pretrained(saved, n_layer=n_layer)


def test_layer_1_is_not_a_prefix_of_layer_10(tmp_path):
    tiny(n_layer=12).save_pretrained(tmp_path)
    assert len(Mamba.from_pretrained(tmp_path, n_layer=11).backbone.layers) == 11
    reconfigure(tmp_path, n_layer=2)
    with pytest.raises(
        CheckpointError, match="and 92 more"
    ):  # ten tensors in each of layers 2 to 11, eight of them named
        Mamba.from_pretrained(tmp_path, n_layer=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_given_type_is_that_of_all_but_A_log_and_D(saved, dtype):
    model = Mamba.from_pretrained(saved, dtype=dtype)
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        wide = name.endswith((".A_log", ".D")) and dtype.itemsize == 2
        assert parameter.dtype == (torch.float32 if wide else dtype), name


def test_without_a_type_each_tensor_keeps_its_own(tmp_path):
    model = tiny(dtype=torch.bfloat16)
    for layer in model.backbone.layers:  # as mamba-ssm's own 16-bit checkpoints
        layer.mixer.A_log.data = layer.mixer.A_log.data.float()
        layer.mixer.D.data = layer.mixer.D.data.float()
    model.save_pretrained(tmp_path)
    back = Mamba.from_pretrained(tmp_path)
    assert same(back, model)
    assert back.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert back(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_an_integer_type_is_refused(saved):
    with pytest.raises(CheckpointError, match="floating-point"):
        Mamba.from_pretrained(saved, dtype=torch.int8)
    rewrite(saved, lambda t: t.update({"backbone.norm_f.weight": torch.ones(12, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"norm_f\.weight is torch\.int8"):
        Mamba.from_pretrained(saved)


FREE = ("A_log", "D", "dt_proj.bias", "norm.bias", "norm_f.bias")


@pytest.mark.parametrize("rms_norm", [True, False])
@pytest.mark.parametrize(("most", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_types_that_cannot_run_together_are_refused(tmp_path, most, other, rms_norm):
    """Of every parameter by itself: what is loaded runs, and what the readable model cannot run is not."""
    model = tiny(dtype=most, tie_embeddings=False, bias=True, rms_norm=rms_norm)
    ids = torch.tensor([[1, 2, 3]])
    for name, parameter in model.named_parameters():
        if ".layers.0." in name or ".layers.2." in name:
            continue
        parameter.data = parameter.data.to(other)
        model.save_pretrained(tmp_path)
        if name.endswith(FREE):
            back = Mamba.from_pretrained(tmp_path)
            assert same(back, model)
            run_on(back, ids)
        else:
            text = rf"the tensors are .*{other} \(1, such as {name}\).*one type.*dtype="
            with pytest.raises(CheckpointError, match=text):
                Mamba.from_pretrained(tmp_path)
            run_on(Mamba.from_pretrained(tmp_path, dtype=torch.float32), ids)
            if not name.endswith("conv1d.bias"):
                with pytest.raises((RuntimeError, ValueError)):
                    run_on(model, ids)
        parameter.data = parameter.data.to(most)


@torch.no_grad()
def run_on(model: Mamba, ids: torch.Tensor) -> None:
    kept = model(ids, keep_state=True)
    assert model(ids, state=kept.state).logits.isfinite().all()


def test_a_tied_head_of_another_type_is_dropped(saved):
    rewrite(saved, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    rewrite(saved, lambda t: t.update({HEAD: t[EMBEDDING].float()}))
    assert {t.dtype for t in Mamba.from_pretrained(saved).state_dict().values()} == {torch.bfloat16}


def test_eight_bits_are_loaded_in_a_type_that_runs(saved):
    rewrite(saved, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}))
    with pytest.raises(CheckpointError, match=r"the tensors are torch\.float8_e4m3fn \(32, such as .*with dtype="):
        Mamba.from_pretrained(saved)
    run_on(Mamba.from_pretrained(saved, dtype=torch.bfloat16), torch.tensor([[1, 2, 3]]))
    with pytest.raises(
        CheckpointError, match=r"dtype=torch\.float8_e4m3fn: weights are floating-point, of torch\.float16"
    ):
        Mamba.from_pretrained(saved, dtype=torch.float8_e4m3fn)


def test_a_module_without_numbers_or_of_several_types_is_refused():
    upstream = tiny()
    upstream.config = UpstreamConfig()
    upstream.backbone.norm_f.float()
    with pytest.raises(CheckpointError, match=r"the live Mamba: .*norm_f\.weight\).*\.to\(dtype\)"):
        Mamba.from_module(upstream)
    upstream.to("meta")
    with pytest.raises(CheckpointError, match="a Mamba on the meta device, where tensors hold no numbers"):
        Mamba.from_module(upstream)


def test_a_device_that_is_not_here_is_refused(saved):
    absent = [] if torch.cuda.is_available() else ["cuda", torch.device("cuda"), 0]
    for device in (*absent, "gpu", "cuda:x", []):
        with pytest.raises(ConfigError, match=r"device=.* cannot be used here \(.*\); 'cpu' can"):
            Mamba.from_pretrained(saved, device=device)


# strictness


FAULTS = {
    "missing": (lambda t: t.pop("backbone.layers.1.mixer.D"), r"layers\.1\.mixer\.D \(24,\) missing"),
    "extra": (lambda t: t.update(stray=torch.ones(1)), r"stray unexpected"),
    "misshapen": (
        lambda t: t.update({"backbone.norm_f.weight": torch.ones(13)}),
        r"norm_f\.weight is \(13,\), not \(12,\)",
    ),
    "broadcastable": (
        lambda t: t.update({"backbone.norm_f.weight": torch.ones(1)}),
        r"norm_f\.weight is \(1,\), not \(12,\)",
    ),
    "no embedding": (lambda t: t.pop(EMBEDDING), r"embedding\.weight \(32, 12\) missing"),
    "two embeddings": (
        lambda t: t.update({"backbone.embeddings.weight": torch.ones(32, 12)}),
        r"embeddings\.weight unexpected",
    ),
    "another head": (lambda t: t.update({HEAD: t[EMBEDDING] + 1}), "lm_head.weight differs"),
    "a small head": (lambda t: t.update({HEAD: t[EMBEDDING][:29].clone()}), r"lm_head\.weight is \(29, 12\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named(saved, fault):
    change, message = FAULTS[fault]
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        Mamba.from_pretrained(saved)


def test_all_faults_are_named_up_to_eight(saved):
    rewrite(saved, lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k] + [t.update(stray=torch.ones(1))])
    with pytest.raises(CheckpointError, match=r"missing; stray unexpected; (.*layers\.1\..*missing){6}; and 3 more"):
        Mamba.from_pretrained(saved)


def rename(folder: Path, name) -> Path:
    """Give the tensors of a folder's model.safetensors other names."""
    return rewrite(folder, lambda t: [t.update({name(key): t.pop(key)}) for key in list(t)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path, layout, prefix, tied):
    model = tiny(tie_embeddings=tied)
    model.save_pretrained(tmp_path, layout=layout)
    rename(tmp_path, lambda key: prefix + key)
    assert same(Mamba.from_pretrained(tmp_path), model)
    assert len(Mamba.from_pretrained(tmp_path, n_layer=2).backbone.layers) == 2
    rewrite(tmp_path, lambda t: t.update({key.removeprefix(prefix): t.pop(key) for key in list(t)[:1]}))
    with pytest.raises(CheckpointError, match=rf"missing; {prefix}\S+ unexpected"):  # not of every tensor
        Mamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_model_is_read_where_its_head_is_tied(tmp_path, layout):
    model = tiny()
    model.save_pretrained(tmp_path, layout=layout)
    rename(tmp_path, lambda key: key.removeprefix("backbone."))
    back = Mamba.from_pretrained(tmp_path)
    assert same(back, model) and back.lm_head.weight is back.backbone.embedding.weight
    tied = {"hf": "tie_word_embeddings", "mamba_ssm": "tie_embeddings"}[layout]
    with pytest.raises(
        CheckpointError, match=r"is a base model.*not tied.*lm_head\.weight is missing\. Save the whole"
    ):
        Mamba.from_pretrained(reconfigure(tmp_path, **{tied: False}))


def test_what_transformers_saves_of_a_base_model_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=12, num_hidden_layers=2, vocab_size=32))
    theirs.backbone.save_pretrained(tmp_path)
    assert same(Mamba.from_pretrained(tmp_path), Mamba.from_module(theirs))


def test_of_names_that_do_not_fit_both_sides_are_shown(saved):
    rename(saved, lambda key: f"transformer.{key}")
    with pytest.raises(CheckpointError, match=r"(backbone\S+ \S+ \S* ?missing; transformer\.\S+ unexpected; ){3}"):
        Mamba.from_pretrained(saved)


def test_a_tied_head_that_is_stored_must_be_the_embedding(saved):
    model = Mamba.from_pretrained(rewrite(saved, lambda t: t.update({HEAD: t[EMBEDDING].clone()})))
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_an_untied_head_must_be_stored(saved):
    reconfigure(saved, tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(32, 12\) missing"):
        Mamba.from_pretrained(saved)


def test_a_tied_model_whose_head_was_replaced_is_not_saved(saved):
    model = tiny()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(CheckpointError, match="tied"):
        model.save_pretrained(saved)
    assert same(Mamba.from_pretrained(saved), tiny())


# files that are not there, broken or hostile


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


def test_what_is_no_path_is_refused(saved):
    for wrong in (None, 3, b"x"):
        for call in (Mamba.from_pretrained, tiny().save_pretrained):
            with pytest.raises(CheckpointError, match=r"path=.* is no path; give a folder"):
                call(wrong)
    for file in (saved / "config.json", saved / "config.json" / "under"):
        with pytest.raises(CheckpointError, match="is a file, or in one; give a folder"):
            tiny().save_pretrained(file)
    assert same(Mamba.from_pretrained(saved), tiny())


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


# writing


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


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="layout='HF' is unknown; 'mamba_ssm' and 'hf' are"):
        tiny().save_pretrained(tmp_path / "new", layout="HF")
    assert not (tmp_path / "new").exists()


def test_the_mamba_ssm_layout_cannot_hold_a_norm_eps(tmp_path):
    with pytest.raises(ConfigError, match=r"norm_eps=0\.001"):
        tiny(norm_eps=1e-3).save_pretrained(tmp_path / "new")
    tiny(norm_eps=1e-3).save_pretrained(tmp_path, layout="hf")
    assert Mamba.from_pretrained(tmp_path).config.norm_eps == 1e-3


# the hub


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
            raise hub.errors.LocalEntryNotFoundError(f"no {name}")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(Mamba.from_pretrained("someone/mamba", revision="v1"), model)
    assert {(repo, revision) for repo, _, revision in asked} == {("someone/mamba", "v1")}
    assert asked[0][1] == "config.json"
    assert kind in [name for _, name, _ in asked]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"no folder some/one.*config\.json.*LocalEntry.*local cache.*network"):
        Mamba.from_pretrained("some/one")


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "some" / "one")
    monkeypatch.chdir(tmp_path)
    assert same(Mamba.from_pretrained("some/one"), tiny())
