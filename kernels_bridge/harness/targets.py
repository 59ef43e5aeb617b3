"""The targets that the check knows by name, each made from one `Mamba` so that all have the same weights."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from minimal_mamba import Mamba, Ops
from minimal_mamba.checkpoint import HF_EMBEDDING, under
from minimal_mamba.errors import BackendUnavailable, CheckpointError, InputError, nearest
from minimal_mamba.scan import READABLE

from ..backends import BACKENDS, resolve
from .theirs import Theirs
from .watch import Implementation, Ours


def transformers_model(model: Mamba, **options: Any) -> nn.Module:
    """HF's `MambaForCausalLM` or `FalconMambaForCausalLM` with the same weights, in its sequential path on a CPU.

    Args:
        options: of its configuration.
    Raises:
        BackendUnavailable: transformers is missing, or would take mamba_ssm's functions in the place of its own.
    """
    if importlib.util.find_spec("mamba_ssm") and model.device.type == "cpu":
        raise BackendUnavailable(
            "target 'hf' on a CPU where mamba_ssm is installed: transformers binds mamba_ssm's functions when it is "
            "imported and then cannot run on a CPU. Use an environment without mamba_ssm."
        )
    transformers = _package("transformers", "pip install 'mambascope[train]'")
    raw = model.config.to_hf() | {"use_mambapy": False} | options
    (kind,) = raw.pop("architectures")
    theirs: nn.Module = getattr(transformers, kind)(transformers.AutoConfig.for_model(**raw))
    theirs.to(model.device, model.dtype)  # before the weights are copied, which would else be rounded
    theirs.load_state_dict(under(HF_EMBEDDING, model.state_dict()))
    return theirs


def mamba_ssm_model(model: Mamba) -> nn.Module:
    """mamba-ssm's `MambaLMHeadModel` with the same weights.

    Raises:
        BackendUnavailable: mamba_ssm is missing.
    """
    lm = _package("mamba_ssm.models.mixer_seq_simple", "pip install 'mambascope[cuda]' --no-build-isolation")
    config = _package("mamba_ssm.models.config_mamba", "pip install 'mambascope[cuda]' --no-build-isolation")
    theirs = lm.MambaLMHeadModel(config.MambaConfig(**model.config.to_mamba_ssm()), device=model.device)
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.dtype)


def _package(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(f"this target needs {name} ({error}); {remedy}.") from None


MODULES: dict[str, Callable[[Mamba], nn.Module]] = {"hf": transformers_model, "mamba_ssm": mamba_ssm_model}
NAMES = [*BACKENDS, *MODULES]
NUDGED = 3
# of 2,156 comparisons of `torch` with the readable model, both in 16 bits, one rounding of that was too few for 46, two
# for 13, three for 3: all of whole models, where a rounding goes through every layer after it
NUDGED_WHOLE = 7


def target(name: str, model: Mamba) -> Implementation:
    """The implementation of this name, on the model's weights, device and type.

    Raises:
        BackendUnavailable: an unknown name, or one that cannot run here.
    """
    if name in MODULES:
        return Theirs(MODULES[name](model), name)
    if name not in BACKENDS:
        raise BackendUnavailable(f"no target {name!r}.{nearest(name, NAMES)} There are {', '.join(NAMES)}.")
    return Ours(model, resolve(name, model.device))


def reference(model: Mamba) -> Ours:
    """The readable model in float64, with the weights rounded as `model` has them: what everything is held against."""
    exact = Mamba(model.config).to(model.device, torch.float64)
    exact.load_state_dict(model.state_dict())
    return Ours(exact, READABLE, "reference float64")


def readable(model: Mamba) -> Ours:
    """The readable model in the model's own type: how much rounding the type alone costs."""
    return Ours(model, Ops("reference", READABLE.conv, READABLE.scan))


@torch.no_grad()
def roundings(model: Mamba, seed: int = 0, several: int = NUDGED) -> Iterator[Ours]:
    """The readable model in the model's own type; but for float64 also with one weight in eight moved by a last place.

    Where a sum cancels or a norm divides by little, one rounding errs several times as much as another: the size of the
    error is known from several. In float64 it is nowhere near its floor.
    """
    yield readable(model)
    unit = torch.finfo(model.dtype).eps
    rng = torch.Generator().manual_seed(seed)
    for _ in range(several if model.dtype != torch.float64 else 0):
        moved = Mamba(model.config).to(model.device, model.dtype)
        moved.load_state_dict(model.state_dict())
        for weight in moved.parameters():
            step = torch.randint(-8, 9, weight.shape, generator=rng)
            factor = 1 + unit * torch.where(step.abs() == 8, step.sign(), 0).to(weight.device)
            weight.copy_(weight.float() * factor)
        yield readable(moved)


def imported(name: str) -> nn.Module:
    """What `module:function` returns: a live module of transformers' or mamba-ssm's layout, or one of ours.

    Raises:
        InputError: it cannot be imported, or returns no module.
    """
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{name!r} cannot be called: {error!r}. Give module:function, importable from here, a function without "
            f"arguments that returns a module; or a name: {', '.join(NAMES)}."
        ) from None
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned a {type(made).__name__}; it returns a torch module.")
    return made


def same_weights(one: nn.Module, two: nn.Module) -> None:
    """Raise CheckpointError, which names a parameter, where two modules' weights differ."""
    a, b = (m if isinstance(m, Mamba) else Mamba.from_module(m) for m in (one, two))
    if a.config != b.config:
        raise CheckpointError(f"the two have other configurations: {a.config} and {b.config}.")
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        other = theirs[name].to(value)
        if not torch.equal(value, other):
            gap = float((value - other).abs().max())
            raise CheckpointError(
                f"{name} differs between the two, by up to {gap:.3g}; implementations are compared on the same weights."
            )
