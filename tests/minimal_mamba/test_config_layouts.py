"""Configurations as the two layouts write them: read, refused where they say what is not implemented, and kept."""

import dataclasses
import json

import pytest
from helpers import lively

from minimal_mamba import Mamba, MambaConfig
from minimal_mamba.config import HF_TYPES
from minimal_mamba.errors import ConfigError

LAYOUTS = ["mamba_ssm", "hf"]
PILE = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
PILE_HF = {
    "_name_or_path": "/home/x", "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
    "d_inner": 1536, "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
    "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
    "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
FALCON = {  # falcon-mamba-7b: its expand contradicts its sizes
    "_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
    "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1,
    "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba", "num_hidden_layers": 64,
    "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
    "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "vocab_size": 65024,
}  # fmt: skip


def test_falcon_mambas_published_configuration_is_read():
    config = MambaConfig.from_dict(FALCON)
    assert (config.d_model, config.d_inner, config.expand, config.rank, config.n_layer) == (4096, 8192, 2, 256, 64)
    assert config.mixer_rms_eps == 1e-6 and not config.tie_embeddings
    assert MambaConfig.from_dict(FALCON | {"mixer_rms_eps": 1e-3}).mixer_rms_eps == 1e-3
    assert MambaConfig.from_dict(config.to_hf()) == config
    with pytest.raises(ConfigError, match=r"mixer_rms_eps=1e-06: mamba-ssm's layout has no field.*Save the HF layout"):
        config.to_mamba_ssm()


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_hf_makes_the_layers_by_their_stated_width(model_type):
    transformers = pytest.importorskip("transformers")
    for inner in (24, 32, 181):
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 8, "expand": 3, "intermediate_size": inner}
        raw = transformers.AutoConfig.for_model(model_type, **sizes)
        theirs = transformers.AutoModelForCausalLM.from_config(raw)
        ours = Mamba.from_module(theirs)  # refuses tensors of other shapes
        assert ours.config.d_inner == inner == theirs.backbone.layers[0].mixer.A_log.shape[0]
        again = transformers.AutoConfig.for_model(**ours.config.to_hf())
        assert again.intermediate_size == inner and MambaConfig.from_dict(ours.config.to_hf()) == ours.config


def test_every_width_is_read_as_it_is_stated():
    for d, inner in ((7, 61), (7, 115), (12, 5), (4096, 10001)):  # of some int(inner / d * d) is inner - 1
        raw = {"model_type": "mamba", "hidden_size": d, "num_hidden_layers": 1, "vocab_size": 8}
        config = MambaConfig.from_dict(raw | {"intermediate_size": inner})
        assert config.d_inner == inner == MambaConfig.from_dict(config.to_hf()).d_inner


def test_what_neither_layout_holds_is_not_sent_from_one_to_the_other():
    config = MambaConfig(12, 1, 8, rms_norm=False, mixer_rms_eps=1e-6)
    text = r"RMSNorm only\. .*No layout holds this model: keep model\.state_dict\(\)"
    with pytest.raises(ConfigError, match=f"mixer_rms_eps=1e-06: mamba-ssm's layout has no field for it.*{text}"):
        config.to_mamba_ssm()
    with pytest.raises(ConfigError, match=r"mamba-ssm's has no field for mixer_rms_eps=1e-06\. No layout"):
        config.to_hf()
    with pytest.raises(ConfigError, match=r"RMSNorm only\. Save the mamba-ssm layout\."):
        MambaConfig(12, 1, 8, rms_norm=False).to_hf()


def test_the_published_configurations_are_read():
    ours, hf = MambaConfig.from_dict(PILE), MambaConfig.from_dict(PILE_HF)
    for name in ("d_model", "n_layer", "d_state", "d_conv", "expand", "rank", "d_inner", "padded_vocab", "norm_eps"):
        assert getattr(ours, name) == getattr(hf, name), name
    assert (ours.padded_vocab, ours.vocab_size, hf.vocab_size, ours.rank) == (50280, 50277, 50280, 48)
    assert ours.tie_embeddings
    assert hf.tie_embeddings


def test_bookkeeping_of_others_is_passed_over():
    kept = {"_attn_implementation_autoset": True, "_commit_hash": "abc", "_new": 1, "auto_map": {"AutoModel": "x.Y"}}
    kept |= {"unsloth_version": "2025.3", "quantization_config": None}
    assert MambaConfig.from_dict(PILE_HF | kept) == MambaConfig.from_dict(PILE_HF)


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_every_key_that_hf_writes_is_read(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, hidden_size=12, num_hidden_layers=2, vocab_size=32)
    want = MambaConfig.from_dict(config.to_dict())
    assert (want.mixer_rms_eps is None) == (model_type == "mamba")
    assert MambaConfig.from_dict(config.to_diff_dict()) == want
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert MambaConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == want
    assert MambaConfig.from_dict(want.to_hf()) == dataclasses.replace(want, dt_rank=1)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (PILE, {"ssm_cfg": {"layer": "Mamba2"}}, "layer='Mamba2'.*'Mamba1' only"),
        (PILE, {"ssm_cfg": {"headdim": 64, "layer": "Mamba2"}}, "layer='Mamba2'"),
        (PILE, {"ssm_cfg": {"d_stat": 16}}, "'d_stat'.*Did you mean 'd_state'"),
        (PILE, {"n_layers": 24}, "'n_layers'.*Did you mean 'n_layer'"),
        (PILE, {"d_intermediate": 1}, "d_intermediate=1"),
        (PILE, {"attn_layer_idx": [1]}, "attn_layer_idx"),
        (PILE_HF, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (PILE_HF, {"hiden_size": 768}, "'hiden_size'.*Did you mean 'hidden_size'"),
        (PILE_HF, {"model_type": "mamba2", "num_heads": 8}, "model_type='mamba2'"),
        (PILE_HF, {"d_model": 512}, "d_model=512 contradicts hidden_size=768"),
        (PILE_HF, {"intermediate_size": 768}, "d_inner=1536, but the model has 768 inner channels"),
        (PILE_HF, {"intermediate_size": "768"}, "intermediate_size='768', but the model has 1536 inner channels"),
        (PILE_HF, {"mixer_rms_eps": 1e-6}, "unknown key 'mixer_rms_eps'"),
        (PILE_HF, {"rms_norm": False}, "rms_norm=False"),
        (PILE_HF, {"quantization_config": {"bits": 4}}, "the weights are quantised.*Load the checkpoint"),
        (PILE_HF, {"stray": 1}, r"unknown key 'stray' \(value 1\).*remove it from config\.json"),
        (PILE, {"_commit_hash": "abc"}, r"unknown key '_commit_hash'.*remove it from config\.json"),
        (PILE, {"ssm_cfg": [1]}, r"ssm_cfg=\[1\] holds no keys"),
        (PILE, {"ssm_cfg": "x"}, "ssm_cfg='x' holds no keys"),
        (PILE, {"ssm_cfg": []}, r"ssm_cfg=\[\] holds no keys"),
        (PILE_HF, {"ssm_cfg": [1]}, r"ssm_cfg=\[1\]"),
    ],
)
def test_what_is_not_implemented_is_refused(base, change, message):
    with pytest.raises(ConfigError, match=message):
        MambaConfig.from_dict(base | change)


def test_every_field_that_changes_the_numbers_survives(tmp_path):
    """A field of MambaConfig that one layout forgets would come back as its default."""
    config = MambaConfig(
        d_model=12, n_layer=2, vocab_size=29, d_state=5, d_conv=3, expand=3, dt_rank=4, conv_bias=False, bias=True,
        residual_in_fp32=False, tie_embeddings=False, pad_vocab_size_multiple=16, dt_min=0.01, dt_max=0.2,
        dt_init="constant", dt_scale=2.0, dt_init_floor=1e-3,
    )  # fmt: skip
    model = lively(Mamba(config))
    for layout in LAYOUTS:
        model.save_pretrained(tmp_path / layout, layout=layout)
        back = Mamba.from_pretrained(tmp_path / layout).config
        changed = {"vocab_size": 32, "pad_vocab_size_multiple": 1, "rescale_prenorm_residual": False}
        assert back == (dataclasses.replace(config, **changed) if layout == "hf" else config)
