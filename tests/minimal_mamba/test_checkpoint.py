"""Checkpoints read: bit-equal round trips, layers and types, and tensors that do not fit the config."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import EMBEDDING, HEAD, KINDS, LAYOUTS, reconfigure, rewrite, same
from helpers import tiny

from minimal_mamba import Mamba
from minimal_mamba.errors import CheckpointError, ConfigError


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


@pytest.mark.parametrize("safetensors", KINDS)
def test_falcon_mamba_round_trips_through_transformers(tmp_path, safetensors):
    transformers = pytest.importorskip("transformers")
    model = tiny(mixer_rms_eps=1e-3, dtype=torch.float32, tie_embeddings=False)
    with pytest.raises(ConfigError, match="Save the HF layout"):
        model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "ours", layout="hf", safetensors=safetensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == "FalconMambaForCausalLM"
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = Mamba.from_pretrained(tmp_path / folder)
        assert same(back, model) and back.config.mixer_rms_eps == 1e-3
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, back(ids).logits, rtol=1e-5, atol=1e-5)


def test_layernorm_and_its_bias_round_trip(tmp_path):
    model = tiny(rms_norm=False)
    model.save_pretrained(tmp_path)
    assert same(Mamba.from_pretrained(tmp_path), model)
    with pytest.raises(ConfigError, match="RMSNorm only"):
        model.save_pretrained(tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


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


def test_a_device_that_is_not_here_is_refused(saved):
    absent = [] if torch.cuda.is_available() else ["cuda", torch.device("cuda"), 0]
    for device in (*absent, "gpu", "cuda:x", []):
        with pytest.raises(ConfigError, match=r"device=.* cannot be used here \(.*\); 'cpu' can"):
            Mamba.from_pretrained(saved, device=device)


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
