"""What a function is known by, so that a saved sweep is not gone on with under another one of the same name."""

import dis
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimal_mamba.errors import EditError
from minimal_mamba.provenance import digest

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, type(None), type(...))


def known_by(fn: Callable[..., Any]) -> str:
    """A digest of a function's code and of all that it holds: captured and global values, defaults, bound arguments.

    What the functions that it calls do is not looked into, but where it holds them itself.

    Raises:
        EditError: it holds something else, such as an object, by whose state two functions could differ unseen.
    """
    return digest(*_parts(fn, f"{fn!r:.80}", ()))


def _parts(value: Any, whose: str, within: tuple[int, ...]) -> list[object]:
    if id(value) in within:  # a function that calls itself
        return ["itself"]
    within = (*within, id(value))
    if isinstance(value, (Tensor, *PLAIN)):
        return [type(value).__name__, value]
    if isinstance(value, np.ndarray | np.generic):
        return ["array", torch.as_tensor(value)]
    if isinstance(value, list | tuple):
        return [type(value).__name__, len(value), *(x for v in value for x in _parts(v, whose, within))]
    if isinstance(value, dict):
        return [len(value), *(x for item in value.items() for v in item for x in _parts(v, whose, within))]
    if isinstance(value, partial):
        return ["partial", *_parts((value.func, value.args, value.keywords), whose, within)]
    if isinstance(value, types.FunctionType):
        return _function(value, whose, within)
    if isinstance(value, types.ModuleType):
        return [value.__name__]
    if isinstance(value, type | types.BuiltinFunctionType | np.ufunc) or type(value).__name__ == "method_descriptor":
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType | type):
            return [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]
    raise EditError(
        f"path= cannot tell {whose} from another function of that name: it holds {value!r:.60}, a "
        f"{type(value).__name__}. Let it hold numbers, tensors and functions only, or give no path."
    )


def _function(fn: types.FunctionType, whose: str, within: tuple[int, ...]) -> list[object]:
    code = fn.__code__
    held = [cell.cell_contents for cell in fn.__closure__ or ()]
    used = {name: fn.__globals__[name] for name in _names(code) if name in fn.__globals__}
    seen = {k: v.__qualname__ if isinstance(v, types.FunctionType) else v for k, v in used.items()}
    parts = [fn.__module__, fn.__qualname__, *_code(code)]
    return parts + _parts((held, seen, fn.__defaults__, fn.__kwdefaults__), whose, within)


def _names(code: types.CodeType) -> list[str]:
    """The global names that it reads."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"] + inner


def _code(code: types.CodeType) -> list[object]:
    """Without names of files and numbers of lines."""
    consts = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else c
        for c in code.co_consts
    ]
    return [code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts]
