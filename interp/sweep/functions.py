"""What a function is known by, so that a saved sweep is not gone on with under another one of the same name."""

import dis
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minimal_mamba.edits import function_name
from minimal_mamba.errors import EditError
from minimal_mamba.provenance import digest

PLAIN = (
    bool, int, float, complex, str, bytes, range, slice, type(None), type(...), np.dtype, torch.dtype, torch.device,
    torch.Size,
)  # fmt: skip
CONSTANTS = (*PLAIN, Tensor, np.ndarray, list, tuple, set, frozenset, dict)
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def known_by(fn: Callable[..., Any]) -> str:
    """A digest of a function's code and of all that it holds: captured and global values, defaults, bound arguments.

    So too of the functions that it holds or that stand beside it in its module; of others their names. Of a module,
    class or function among its global names, the constants that it reads there, as in `config.SCALE`.

    Raises:
        EditError: it holds something else, such as an object, by whose state two functions could differ unseen.
    """
    return digest(*_Known(f"{fn!r:.80}").parts(fn))


class _Known:
    """The parts of one function, each function within it once."""

    def __init__(self, whose: str):
        self.whose, self.seen = whose, set[int]()

    def parts(self, value: Any, held: bool = True) -> list[object]:
        """Of any value; `held`: by the function itself, not by a helper that it calls."""
        kind = type(value).__name__
        if isinstance(value, PLAIN):
            return [kind, value]
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            return [kind, value.detach().resolve_conj().resolve_neg()]
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            return [kind, value.dtype, value.shape, np.ascontiguousarray(value).tobytes()]
        if isinstance(value, list | tuple):
            return [kind, len(value), *(x for v in value for x in self.parts(v, held))]
        if isinstance(value, set | frozenset):
            return [kind, sorted(digest(*self.parts(v, held)) for v in value)]
        if isinstance(value, dict):
            return [kind, len(value), *(x for item in value.items() for v in item for x in self.parts(v, held))]
        if isinstance(value, partial):
            return [kind, *self.parts((value.func, value.args, value.keywords), held)]
        if isinstance(value, types.FunctionType):
            return self.function(value, held)
        if isinstance(value, types.MethodType):
            return [kind, *self.parts((value.__func__, value.__self__), held)]
        if isinstance(value, nn.Module):
            state = value.state_dict()
            return [kind, repr(value), *(x for name in sorted(state) for x in (name, *self.parts(state[name])))]
        if isinstance(value, types.ModuleType):
            return [value.__name__]
        if isinstance(value, type) or type(value).__name__ == "method_descriptor":
            return [getattr(value, "__module__", None), value.__qualname__]
        try:
            return [function_name(value)] if callable(value) else self.unknown(value, held)
        except EditError:
            owner = getattr(value, "__self__", None)  # of a builtin the module that it is in
            if isinstance(value, types.BuiltinFunctionType) and (owner is None or isinstance(owner, type | type(dis))):
                return [getattr(value, "__module__", None), value.__qualname__]
            return self.unknown(value, held)

    def unknown(self, value: Any, held: bool) -> list[object]:
        if not held:
            return [f"{type(value).__module__}.{type(value).__qualname__}"]
        raise EditError(
            f"path= cannot tell {self.whose} from another function of that name: it holds {value!r:.60}, a "
            f"{type(value).__name__}. Let it hold numbers, tensors, modules and functions only, or give no path."
        )

    def function(self, fn: types.FunctionType, held: bool) -> list[object]:
        # torch.no_grad and its like
        if fn.__globals__.get("__name__") == "torch.utils._contextlib" and hasattr(fn, "__wrapped__"):
            return ["decorated", *self.parts(fn.__wrapped__, held)]
        if id(fn) in self.seen:
            return [fn.__qualname__]
        self.seen.add(id(fn))
        parts: list[object] = [fn.__module__, fn.__qualname__, *_code(fn.__code__, fn.__doc__)]
        for cell in fn.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # nothing is in it yet
                parts.append("empty")
            else:
                parts += self.parts(inside, held)
        read = {*_names(fn.__code__, *ATTRIBUTES)}
        for name in _names(fn.__code__, "LOAD_GLOBAL"):
            value = fn.__globals__.get(name)
            if isinstance(value, types.ModuleType | type | types.FunctionType):  # its constants, such as config.SCALE
                there = vars(value)
                held_there = (n for n in sorted(read & there.keys()) if isinstance(there[n], CONSTANTS))
                parts += [x for n in held_there for x in (n, *self.parts(there[n], held=False))]
            if not isinstance(value, types.FunctionType):
                parts += [name, *self.parts(value, held)]
            elif value.__module__ in (fn.__module__, "__main__") or value.__name__ == "<lambda>":
                parts += [name, *self.function(value, held=False)]
            else:
                parts += [name, value.__module__, value.__qualname__]
        return parts + self.parts((fn.__defaults__, fn.__kwdefaults__), held)


def _names(code: types.CodeType, *operations: str) -> list[str]:
    """The names that it reads by one of these operations."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c, *operations)]
    return [i.argval for i in dis.get_instructions(code) if i.opname in operations] + inner


def _code(code: types.CodeType, doc: str | None = None) -> list[object]:
    """Without what it says of itself, names of files and numbers of lines."""
    consts = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else c
        for c in code.co_consts
        if doc is None or c != doc
    ]
    return [code.co_code, code.co_names, code.co_varnames, code.co_freevars, consts]
