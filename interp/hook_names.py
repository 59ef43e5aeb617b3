"""The hook names of MambaLens and TransformerLens, and what each of them is here: one table, name -> site.

Most names are a site. Six are made of several sites, each by one line of the peer's code: `DERIVED`. Some have no exact
counterpart and say what to use instead: `REFUSED`.

The trap: MambaLens' `blocks.3.hook_h.7` is our `ssm_state`, whose edit propagates to later tokens; TransformerLens'
`blocks.3.mixer.hook_ssm_state` is our `state_read`, whose edit changes what is read at each position, no more.

Source: Phylliida/MambaLens, README.md @ 0072bbf and mamba_lens/HookedMamba.py @ 2952d84; TransformerLens v4.0.0b1,
ssm_mixer.py (Mamba-1), ssm_block.py and docs/source/content/ssm_interpretability.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba import Address, MambaConfig, at
from minimal_mamba.address import address_of
from minimal_mamba.block import Layer, wide
from minimal_mamba.errors import AddressError, UnknownSiteError, nearest

MODEL = {"hook_embed": "embed", "hook_norm": "final_norm", "hook_logits": "logits"}  # without a layer
BLOCK = {  # blocks.{layer}.
    "hook_resid_pre": "resid_pre",
    "hook_normalized_input": "mixer_in",
    "hook_skip": "z",  # MambaLens' skip is the gate before SiLU; our `skip` is D u
    "hook_in_proj": "x",
    "hook_conv": "conv",
    "hook_ssm_input": "u",
    "hook_delta_1": "dt_low",
    "hook_delta": "dt",
    "hook_B": "B",
    "hook_C": "C",
    "hook_y": "y",
    "hook_ssm_output": "ssm_out",
    "hook_after_skip": "gated",
    "hook_out_proj": "mixer_out",
    "hook_resid_post": "resid_post",
}
ALIASES = {  # TransformerLens' names of the same values; the left is matched by its exact name only
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "hook_mixer_in": "hook_normalized_input",
    "mixer.hook_in": "hook_normalized_input",
    "hook_mixer_out": "hook_out_proj",
    "mixer.hook_out": "hook_out_proj",
    "mixer.hook_ssm_out": "hook_out_proj",  # of TransformerLens: the mixer's output. Our ssm_out is hook_ssm_output
    "mixer.hook_dt_proj": "hook_delta_2",
    "mixer.dt_proj.hook_out": "hook_delta_2",
    "mixer.hook_ssm_dt": "hook_delta_2",
}
REFUSED = {
    "hook_h": "there is one a position: hook_h.0, hook_h.1, ...",
    "mixer.hook_in_proj": "both halves in one tensor: use hook_in_proj (x) and hook_skip (the gate), or at.x and at.z",
    "mixer.hook_conv": "untrimmed and channel-first: use hook_conv, or at.conv",
    "mixer.hook_x_proj": "three in one tensor: use hook_delta_1, hook_B and hook_C, or at.dt_low, at.B and at.C",
}
START, A = "hook_h_start", "hook_A"

Seen = Callable[[str], Tensor]  # a site of this layer -> (b, l, ...)


@dataclass(frozen=True)
class Derived:
    """A value that is no site: made of the sites `needs`, and put into the site `target`, which comes after them.

    Args:
        read: (the layer, its sites) -> the value that the hook is given. write: (..., the hook's value) -> the target,
            (b, l, ...), also where the target exists one position at a time.
        whole: the target -> the value, where the target holds all of it. Such a name is cached from its target, which
            another name's hook may have written too.
    """

    needs: tuple[str, ...]
    target: str
    read: Callable[[Layer, Seen], Tensor]
    write: Callable[[Layer, Seen, Tensor], Tensor]
    whole: Callable[[Tensor], Tensor] | None = None


def _delta_2(layer: Layer, seen: Seen) -> Tensor:
    weight, bias, low = layer.mixer.dt_proj.weight, layer.mixer.dt_proj.bias, seen("dt_low")
    w = wide(weight.dtype)
    return F.linear(low, weight).to(w) + bias.to(w)  # as in Mixer.scan


def _b_bar(layer: Layer, seen: Seen) -> Tensor:
    return seen("dt")[..., None] * seen("B").to(seen("dt").dtype)[:, :, None]  # (b, l, e, n)


def _trajectory(layer: Layer, seen: Seen) -> Tensor:
    return rearrange(seen("state_read"), "b l e n -> b e l n")


def _read_out(layer: Layer, seen: Seen, states: Tensor) -> Tensor:
    return torch.einsum("b e l n, b l n -> b l e", states, seen("C").to(states.dtype))


DERIVED = {
    "hook_layer_input": Derived(  # what the mixer alone sees of the residual stream, before its norm
        ("resid_pre",), "mixer_in", lambda layer, seen: seen("resid_pre"), lambda layer, seen, v: layer.norm(v)
    ),
    "hook_delta_2": Derived(("dt_low",), "dt", _delta_2, lambda layer, seen, v: F.softplus(v)),
    "hook_A_bar": Derived(
        ("dt",),
        "decay",
        lambda layer, seen: torch.exp(seen("dt")[..., None] * layer.mixer.A(seen("dt").dtype)),
        lambda layer, seen, v: v,
    ),
    "hook_B_bar": Derived(
        ("u", "dt", "B"), "state_write", _b_bar, lambda layer, seen, v: v * seen("u").to(v.dtype)[..., None]
    ),
    "mixer.hook_ssm_write": Derived(  # (b, e, l, n); an edit propagates
        ("u", "dt", "B"),
        "state_write",
        lambda layer, seen: rearrange(
            (seen("dt") * seen("u"))[..., None] * seen("B").to(seen("dt").dtype)[:, :, None], "b l e n -> b e l n"
        ),
        lambda layer, seen, v: rearrange(v, "b e l n -> b l e n"),
        lambda write: rearrange(write, "b l e n -> b e l n"),
    ),
    "mixer.hook_ssm_state": Derived(("state_read", "C"), "y", _trajectory, _read_out),  # (b, e, l, n); y only
}
# in the order in which a layer reaches them
ORDER = (
    *("hook_resid_pre", "hook_layer_input", "hook_normalized_input", "hook_skip", "hook_in_proj", "hook_conv"),
    *("hook_ssm_input", A, START, "hook_delta_1", "hook_delta_2", "hook_delta", "hook_A_bar", "hook_B", "hook_B_bar"),
    *("hook_C", "hook_h", "hook_y", "hook_ssm_output", "hook_after_skip", "hook_out_proj", "hook_resid_post"),
)
STATES = ("mixer.hook_ssm_write", "mixer.hook_ssm_state")  # TransformerLens' own, under its own names


def all_names(config: MambaConfig, length: int) -> list[str]:
    """Every hook name of a run of this length, in the order of the forward; aliases are not among them."""
    states = [f"hook_h.{t}" for t in range(length)]
    block = [name for n in ORDER for name in (states if n == "hook_h" else [n])] + list(STATES)
    return ["hook_embed", *(f"blocks.{i}.{name}" for i in range(config.n_layer) for name in block), *list(MODEL)[1:]]


@dataclass(frozen=True)
class Point:
    """A hook name, understood: the canonical `kind`, the layer if it has one, and the address if it is a site."""

    name: str
    kind: str
    layer: int | None
    address: Address | None


def find(name: str, config: MambaConfig, length: int | None = None) -> Point:
    """What a hook name means.

    Args:
        name: as in `blocks.3.hook_h.7`. length: of the run, to check positions; None leaves them unchecked.
    Raises:
        UnknownSiteError: there is no such name, or it has no exact counterpart; the text says what to use.
        AddressError: a layer or position that this run does not have.
    """
    if name in MODEL:
        return Point(name, name, None, address_of(MODEL[name]))
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(name))
    if not match:
        raise _unknown(name, config)
    layer, given = int(match[1]), match[2]
    kind = ALIASES.get(given, given)
    if kind in REFUSED:
        raise UnknownSiteError(f"{name} is not offered here: {REFUSED[kind]}.")
    state = re.fullmatch(r"hook_h\.(\d+)", kind)
    if not (state or kind in BLOCK or kind in DERIVED or kind in (START, A)):
        raise _unknown(name, config)
    if layer >= config.n_layer:
        raise AddressError(f"{name}: there are blocks 0..{config.n_layer - 1}.")
    if state:
        pos = int(state[1])
        if length is not None and pos >= length:
            raise AddressError(f"{name}: this run has the positions 0..{length - 1}.")
        return Point(name, kind, layer, at.ssm_state(layer=layer, pos=pos))
    return Point(name, kind, layer, address_of(BLOCK[kind], layer) if kind in BLOCK else None)


def address(name: str, config: MambaConfig) -> Address:
    """The address that a hook name stands for, to go on with `run` and edits.

    Raises:
        UnknownSiteError: the name is made of several sites, or of none; the text names them.
    """
    point = find(name, config)
    if point.address is None:
        rule = DERIVED.get(point.kind)
        if rule is None:
            instead = "model.initial_state and run(..., state=)" if point.kind == START else "the parameter A_log"
        else:
            instead = f"at.{rule.target}, made of {', '.join(rule.needs)}"
        raise UnknownSiteError(f"{name} is no site; nearest is {instead}.")
    return point.address


def _unknown(name: object, config: MambaConfig) -> UnknownSiteError:
    known = [*all_names(config, 1), *(f"blocks.{i}.{n}" for i in range(config.n_layer) for n in ALIASES)]
    form = "blocks.{layer}.hook_..., as in blocks.0.hook_resid_pre"
    return UnknownSiteError(f"no hook {name!r}.{nearest(str(name), known)} Names are {form}, and {', '.join(MODEL)}.")
