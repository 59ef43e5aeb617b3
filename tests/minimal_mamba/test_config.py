"""The configuration: the initialisation that it asks for, sizes that follow from others, what is refused."""

import math
import pickle
from typing import Any

import pytest
import torch
from helpers import near

from minimal_mamba import Mamba, MambaConfig, MambascopeError
from minimal_mamba.errors import ConfigError
from minimal_mamba.provenance import model_digest


def test_initialisation_is_mamba_ssms() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=1000, d_state=6, bias=True, dt_min=0.002, dt_max=0.05)
    model = Mamba(config)
    embedding = model.backbone.embedding.weight
    assert abs(embedding.std().item() - 0.02) < 0.0005 and abs(embedding.mean().item()) < 0.0005
    assert model.lm_head.weight is embedding
    biases = []
    for layer in model.backbone.layers:
        m = layer.mixer
        near(m.A_log.exp(), torch.arange(1.0, 7.0).expand(128, 6), 1e-5)
        assert m.D.eq(1).all() and m.in_proj.bias.eq(0).all() and m.out_proj.bias.eq(0).all()
        assert layer.norm.weight.eq(1).all()
        biases.append(torch.log1p(m.dt_proj.bias.exp()))  # softplus
        bound = config.rank**-0.5
        assert bound * 0.95 < m.dt_proj.weight.abs().max() <= bound  # uniform up to the bound
        fan_in = 1 / math.sqrt(config.d_inner)  # of nn.Linear's uniform draw, then / sqrt(n_layer)
        assert fan_in / 2 * 0.98 < m.out_proj.weight.abs().max() <= fan_in / 2
        assert m.in_proj.weight.abs().max() > 0.98 / math.sqrt(64)  # not scaled
    dt = torch.cat(biases)
    assert dt.min() >= 0.002 * (1 - 1e-4) and dt.max() <= 0.05 * (1 + 1e-4)
    share = (dt.log().sort().values - math.log(0.002)) / math.log(25)  # uniform in the logarithm
    assert (share - torch.linspace(0, 1, len(dt))).abs().max() < 0.08
    untied = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=8, tie_embeddings=False))
    assert not torch.equal(untied.lm_head.weight, untied.backbone.embedding.weight)


def test_choices_of_initialisation() -> None:
    def mixer(**fields: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return Mamba(MambaConfig(d_model=32, n_layer=4, vocab_size=8, **fields)).backbone.layers[0].mixer

    constant = mixer(dt_init="constant", dt_scale=0.5, dt_rank=4).dt_proj.weight
    assert constant.eq(0.25).all()
    plain, scaled = mixer(rescale_prenorm_residual=False), mixer()
    near(plain.out_proj.weight, scaled.out_proj.weight * 2, 1e-7)
    floored = torch.log1p(mixer(dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3).dt_proj.bias.exp())
    near(floored, torch.full_like(floored, 1e-3), 1e-6)


@pytest.mark.parametrize(
    ("vocab", "multiple", "rows"), [(29, 8, 32), (32, 8, 32), (33, 8, 40), (29, 1, 29), (50277, 8, 50280)]
)
def test_sizes_that_follow_from_others(vocab: int, multiple: int, rows: int) -> None:
    c = MambaConfig(d_model=40, n_layer=1, vocab_size=vocab, pad_vocab_size_multiple=multiple, expand=1.5)
    assert (c.padded_vocab, c.rank, c.d_inner) == (rows, 3, 60)


def test_a_config_goes_through_pickle() -> None:
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=8, expand=1.5, tie_embeddings=False)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_config_is_printed_as_a_call_and_without_falcon_mambas_field_has_the_digest_it_had() -> None:
    for eps in (None, 1e-6):
        config = MambaConfig(d_model=8, n_layer=1, vocab_size=8, mixer_rms_eps=eps)
        assert eval(repr(config)) == config and ("mixer_rms_eps" in repr(config)) == (eps is not None)
    model = Mamba(MambaConfig(d_model=8, n_layer=1, vocab_size=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.5)
    assert model_digest(model) == "c577e4fbee3f37b863688b6c9a1be40d"  # of version 0.1.0, before there was the field


# -- what is refused --------------------------------------------------------------------------------------------------

SIZES = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "pad_vocab_size_multiple", "dt_rank")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", (4,)])
def test_a_size_that_is_no_positive_int_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.*a size is an int of at least 1") as caught:
        MambaConfig(**{"d_model": 8, "n_layer": 1, "vocab_size": 8, name: value})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MambascopeError)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"expand": 0}, "expand=0 with d_model=8 leaves no inner channel"),
        ({"expand": -1}, "expand=-1"),
        ({"expand": 0.1}, "expand=0.1 with d_model=8 leaves no inner channel"),
        ({"expand": "2"}, "expand='2': give a finite number"),
        ({"expand": math.nan}, "expand=nan: give a finite number"),
        ({"expand": math.inf}, "expand=inf: give a finite number"),
        ({"expand": True}, "expand=True: give a finite number"),
        ({"dt_min": 0.0}, r"dt_min=0.0, dt_max=0.1: step sizes have 0 < dt_min <= dt_max"),
        ({"dt_min": -1.0}, r"dt_min=-1.0"),
        ({"dt_min": 0.2}, r"dt_min=0.2, dt_max=0.1"),
        ({"dt_max": "0.1"}, r"dt_max='0.1': give a finite number"),
        ({"norm_eps": 0.0}, r"norm_eps=0.0: an epsilon is above 0"),
        ({"norm_eps": -1e-5}, r"norm_eps=-1e-05: an epsilon is above 0"),
        ({"norm_eps": "1e-5"}, r"norm_eps='1e-5': give a finite number"),
        ({"norm_eps": None}, r"norm_eps=None: give a finite number"),
        ({"mixer_rms_eps": 0}, r"mixer_rms_eps=0: an epsilon is above 0"),
        ({"mixer_rms_eps": math.inf}, r"mixer_rms_eps=inf: give a finite number"),
        ({"mixer_rms_eps": "1e-6"}, r"mixer_rms_eps='1e-6': give a finite number"),
        ({"mixer_rms_eps": True}, r"mixer_rms_eps=True: give a finite number"),
        ({"dt_init_floor": -1.0}, r"dt_init_floor=-1.0: 0 or more"),
        ({"initializer_range": -1}, r"initializer_range=-1: 0 or more"),
        ({"bias": 1}, "bias=1: a flag is True or False"),
        ({"rms_norm": "false"}, "rms_norm='false': a flag is True or False"),
        ({"tie_embeddings": None}, "tie_embeddings=None: a flag is True or False"),
        ({"dt_init": "zeros"}, "dt_init='zeros' is unknown; 'random' and 'constant' are"),
    ],
)
def test_choices_that_do_not_exist_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MambaConfig(**{"d_model": 8, "n_layer": 1, "vocab_size": 8} | fields)
