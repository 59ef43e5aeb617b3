"""Live modules taken over, of transformers and of mamba-ssm."""

import dataclasses

import pytest
import torch
from checkpoints import same
from helpers import tiny
from torch import nn

from minimal_mamba import Mamba
from minimal_mamba.config import HF_TYPES
from minimal_mamba.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("model_type", HF_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_from_module_copies_a_live_hf_model(dtype, model_type):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 5, "conv_kernel": 3}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
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
    other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, num_heads=1, head_dim=24))
    with pytest.raises(CheckpointError, match="given a Mamba2ForCausalLM"):
        Mamba.from_module(other)


def test_a_module_without_numbers_or_of_several_types_is_refused():
    upstream = tiny()
    upstream.config = UpstreamConfig()
    upstream.backbone.norm_f.float()
    with pytest.raises(CheckpointError, match=r"the live Mamba: .*norm_f\.weight\).*\.to\(dtype\)"):
        Mamba.from_module(upstream)
    upstream.to("meta")
    with pytest.raises(CheckpointError, match="a Mamba on the meta device, where tensors hold no numbers"):
        Mamba.from_module(upstream)
