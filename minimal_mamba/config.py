"""MambaConfig: the sizes and choices of a Mamba, and how they are read from the two checkpoint layouts."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError, nearest


@dataclass(frozen=True)
class MambaConfig:
    """Sizes and choices of a Mamba-1 language model; the names are mamba-ssm's.

    Args:
        d_model, n_layer, vocab_size: width, depth, number of tokens.
        d_state, d_conv, expand: state dimensions a channel, conv width, d_inner / d_model.
        dt_rank: rank of the step-size projection; "auto" is ceil(d_model / 16).
        conv_bias, bias: whether the conv, and in_proj and out_proj, have a bias.
        rms_norm: RMSNorm, else LayerNorm. norm_eps: its epsilon.
        mixer_rms_eps: FalconMamba divides dt_low, B and C each by its root mean square, with this epsilon (1e-6 in HF's
            layout); None: Mamba does not.
        residual_in_fp32: keep the residual stream in float32 when the weights have 16 bits.
        tie_embeddings: lm_head shares the embedding's matrix.
        pad_vocab_size_multiple: the embedding has vocab_size rows, rounded up to a multiple of this.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: initialisation of dt_proj, as in mamba-ssm.
        initializer_range: standard deviation of the embedding at initialisation.
        rescale_prenorm_residual: divide out_proj by sqrt(n_layer) at initialisation.
    Raises:
        ConfigError: a size below 1, a number out of its range, a flag that is no bool, or an unknown choice.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] = "auto"
    conv_bias: bool = True
    bias: bool = False
    rms_norm: bool = True
    norm_eps: float = 1e-5
    mixer_rms_eps: float | None = None
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True

    def __post_init__(self) -> None:
        sizes = ["d_model", "n_layer", "vocab_size", "d_state", "d_conv", "pad_vocab_size_multiple"]
        if self.dt_rank != "auto":
            sizes.append("dt_rank")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: a size is an int of at least 1.")
        for name in ("conv_bias", "bias", "rms_norm", "residual_in_fp32", "tie_embeddings", "rescale_prenorm_residual"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: a flag is True or False.")
        epsilons = ["norm_eps"] if self.mixer_rms_eps is None else ["norm_eps", "mixer_rms_eps"]
        for name in ("expand", *epsilons, "dt_min", "dt_max", "dt_scale", "dt_init_floor", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"{name}={value!r}: give a finite number.")
        for name in epsilons:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: an epsilon is above 0.")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"dt_min={self.dt_min!r}, dt_max={self.dt_max!r}: step sizes have 0 < dt_min <= dt_max.")
        if self.dt_init_floor < 0 or self.initializer_range < 0:
            name = "dt_init_floor" if self.dt_init_floor < 0 else "initializer_range"
            raise ConfigError(f"{name}={getattr(self, name)!r}: 0 or more.")
        if self.expand <= 0 or self.d_inner < 1:
            raise ConfigError(f"expand={self.expand!r} with d_model={self.d_model} leaves no inner channel.")
        if self.dt_init not in ("random", "constant"):
            raise ConfigError(f"dt_init={self.dt_init!r} is unknown; 'random' and 'constant' are.")

    def __repr__(self) -> str:
        # without FalconMamba's field where it is not set: saved runs name their model by a digest of this
        shown = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        fields = (f"{name}={value!r}" for name, value in shown if (name, value) != ("mixer_rms_eps", None))
        return f"{type(self).__name__}({', '.join(fields)})"

    @property
    def d_inner(self) -> int:
        """Width e of the mixer."""
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        """Rank r of the step-size projection."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab(self) -> int:
        """Rows v of the embedding, padding included."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def size(self, axis: str) -> int:
        """Size of a feature axis of `SITES`."""
        if axis == "n+k":
            return self.d_state + self.d_conv
        named = {"d": self.d_model, "e": self.d_inner, "n": self.d_state, "r": self.rank, "k": self.d_conv}
        return named[axis] if axis != "v" else self.padded_vocab

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "MambaConfig":
        """Read a `config.json` of either layout; `model_type` tells HF's from mamba-ssm's.

        Raises:
            ConfigError: an unknown key, or a known key with a value that this model does not implement.
        """
        return _from_hf(raw) if "model_type" in raw else _from_mamba_ssm(raw)

    def to_mamba_ssm(self) -> dict[str, Any]:
        """The `config.json` of a `state-spaces/*` checkpoint.

        The layout has no field for `initializer_range` and `rescale_prenorm_residual`, which only say how weights are
        drawn: what is read back has their defaults, and the same weights.
        """
        own = dataclasses.asdict(self)
        ssm = {"layer": "Mamba1"} | {k: own[k] for k in _SSM_KEYS}
        top = {k: own[k] for k in _TOP_KEYS}
        top["ssm_cfg"] = ssm
        if lacking := self._beyond_mamba_ssm():
            hf = "Save the HF layout." if self.rms_norm else f"HF's has RMSNorm only. {_NO_LAYOUT}"
            raise ConfigError(f"{lacking}: mamba-ssm's layout has no field for it. {hf}")
        return top

    def _beyond_mamba_ssm(self) -> str:
        """The first field that mamba-ssm's layout cannot say, with its value; "" if there is none."""
        fixed = ("norm_eps", 1e-5), ("mixer_rms_eps", None)
        return next((f"{name}={getattr(self, name)}" for name, only in fixed if getattr(self, name) != only), "")

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of an HF `MambaForCausalLM`, or of a `FalconMambaForCausalLM`.

        HF knows no padding of the vocabulary: its `vocab_size` is `padded_vocab`, 32 for 29 tokens in multiples of 8,
        and what is read back takes ids up to that. `rescale_prenorm_residual`, which only says how weights are drawn,
        is written as False.
        """
        if not self.rms_norm:
            lacking = self._beyond_mamba_ssm()
            other = f"mamba-ssm's has no field for {lacking}. {_NO_LAYOUT}" if lacking else "Save the mamba-ssm layout."
            raise ConfigError(f"rms_norm=False: HF's layout has RMSNorm only. {other}")
        hf = {theirs: getattr(self, ours) for theirs, ours in _HF_KEYS.items()}
        # HF takes an int, and makes the layers by intermediate_size
        hf |= {"vocab_size": self.padded_vocab, "time_step_rank": self.rank, "expand": max(1, int(self.expand))}
        # where this is true, transformers 5.23 divides out_proj again each time that it loads the checkpoint
        hf["rescale_prenorm_residual"] = False
        if self.mixer_rms_eps is not None:
            hf["mixer_rms_eps"] = self.mixer_rms_eps
        return {
            "architectures": ["MambaForCausalLM" if self.mixer_rms_eps is None else "FalconMambaForCausalLM"],
            "model_type": MAMBA if self.mixer_rms_eps is None else FALCON,
            "intermediate_size": self.d_inner,
            "hidden_act": "silu",
            **hf,
        }


_NO_LAYOUT = "No layout holds this model: keep model.state_dict() and repr(model.config)."
_SSM_KEYS = ["d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"]
_SSM_KEYS += ["dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"]
_TOP_KEYS = ["d_model", "n_layer", "vocab_size", "rms_norm", "residual_in_fp32", "tie_embeddings"]
_TOP_KEYS += ["pad_vocab_size_multiple"]
# Keys of mamba-ssm that this model accepts with these values only; they would change what is computed.
_SSM_FIXED: dict[str, tuple[Any, ...]] = {"layer": ("Mamba1",)}
_TOP_FIXED: dict[str, tuple[Any, ...]] = {"d_intermediate": (0,), "attn_layer_idx": ([],), "attn_cfg": ({},)}
# Keys of mamba-ssm that choose an implementation and change no number.
_SSM_IGNORED = {"use_fast_path", "layer_idx", "device", "dtype"}
_TOP_IGNORED = {"fused_add_norm"}

MAMBA, FALCON = HF_TYPES = "mamba", "falcon_mamba"  # HF's model_type
_HF_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "layer_norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_init_scheme": "dt_init",
    "time_step_scale": "dt_scale",
    "time_step_floor": "dt_init_floor",
    "initializer_range": "initializer_range",
    "rescale_prenorm_residual": "rescale_prenorm_residual",
}
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": HF_TYPES,
    "hidden_act": ("silu", "swish"),
    # state-spaces/*-hf checkpoints carry the fields of mamba-ssm beside HF's own
    "rms_norm": (True,),
    "ssm_cfg": ({},),
}
# What HF writes beside the model: of generation, training and bookkeeping. None of it changes the logits.
_HF_IGNORED = frozenset(
    """
    architectures transformers_version torch_dtype dtype bos_token_id eos_token_id pad_token_id
    cls_token_id sep_token_id decoder_start_token_id unk_token_id use_cache use_mambapy use_associative_scan
    use_falcon_mambapy
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder pruned_heads
    chunk_size_feed_forward finetuning_task id2label label2id problem_type task_specific_params tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens tf_legacy_loss torchscript use_bfloat16 attn_implementation layer_types
    fused_add_norm pad_vocab_size_multiple time_step_init gradient_checkpointing auto_map unsloth_version
    quantization_config
    """.split()
)


def _check(raw: Mapping[str, Any], known: set[str], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    # what is not Mamba-1 says so before the keys that come with it are called unknown
    for key, value in sorted(raw.items(), key=lambda item: item[0] not in fixed):
        if key in fixed:
            if value not in fixed[key]:
                allowed = " or ".join(repr(v) for v in fixed[key])
                raise ConfigError(f"{where}: {key}={value!r}; minimal_mamba implements Mamba-1 with {allowed} only.")
        elif key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r} (value {value!r:.80}).{nearest(key, known)} If it changes nothing that "
                "the model computes, remove it from config.json."
            )


def _from_mamba_ssm(raw: Mapping[str, Any]) -> MambaConfig:
    ssm = raw.get("ssm_cfg")
    if not isinstance(ssm, Mapping | None):
        raise ConfigError(f"config: ssm_cfg={ssm!r:.80} holds no keys; it is an object such as {{'d_state': 16}}.")
    ssm = dict(ssm or {})
    _check(ssm, {*_SSM_KEYS, *_SSM_IGNORED}, _SSM_FIXED, "ssm_cfg")
    top = {k: v for k, v in raw.items() if k != "ssm_cfg"}
    _check(top, {*_TOP_KEYS, *_TOP_IGNORED}, _TOP_FIXED, "config")
    _require(top, ["d_model", "n_layer", "vocab_size"])
    fields = {k: v for k, v in (top | ssm).items() if k in {*_TOP_KEYS, *_SSM_KEYS}}
    return MambaConfig(**fields)


def _from_hf(raw: Mapping[str, Any]) -> MambaConfig:
    # in mamba-ssm's names the same checkpoint repeats sizes, which must agree
    twins = {"d_model": "hidden_size", "n_layer": "num_hidden_layers"}
    raw = {key: value for key, value in raw.items() if not key.startswith("_")}  # where it came from, who wrote it
    keys = _HF_KEYS | ({"mixer_rms_eps": "mixer_rms_eps"} if raw["model_type"] == FALCON else {})
    _check(raw, {*keys, *_HF_IGNORED, *twins, "intermediate_size", "d_inner"}, _HF_FIXED, "config")
    if raw.get("quantization_config") is not None:
        raise ConfigError(
            "config: quantization_config says that the weights are quantised, which minimal_mamba does not read. Load "
            "the checkpoint that they were made from, or save them dequantised."
        )
    _require(raw, ["hidden_size", "num_hidden_layers", "vocab_size"])
    for twin, name in twins.items():
        if twin in raw and raw[twin] != raw[name]:
            raise ConfigError(f"config: {twin}={raw[twin]} contradicts {name}={raw[name]}.")
    fields = {ours: raw[theirs] for theirs, ours in keys.items() if theirs in raw}
    fields.setdefault("initializer_range", 0.1)  # HF's defaults, where they differ from mamba-ssm's
    fields.setdefault("rescale_prenorm_residual", False)
    if raw["model_type"] == FALCON:
        fields.setdefault("mixer_rms_eps", 1e-6)
    inner, d = raw.get("intermediate_size"), raw["hidden_size"]
    if isinstance(inner, int) and isinstance(d, int) and d > 0:
        # HF makes the layers by it, whatever `expand` says: in falcon-mamba-7b's config 16, where it is 2
        fields["expand"] = inner // d if inner % d == 0 else math.nextafter(inner / d, inner)
    config = MambaConfig(**fields, pad_vocab_size_multiple=1)
    for name in ("intermediate_size", "d_inner"):
        if raw.get(name, config.d_inner) != config.d_inner:
            raise ConfigError(f"config: {name}={raw[name]!r}, but the model has {config.d_inner} inner channels.")
    return config


def _require(raw: Mapping[str, Any], names: list[str]) -> None:
    missing = [n for n in names if n not in raw]
    if missing:
        raise ConfigError(f"config: {', '.join(missing)} missing; found {', '.join(sorted(raw)) or 'nothing'}.")
