"""Logits of which the last position is there, and the rest is made if a metric asks for it."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FORM = {  # what is asked of the wrapper itself: no numbers
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")),
}  # fmt: skip


GIVEN: ContextVar[Tensor | None] = ContextVar("GIVEN", default=None)  # to the metric that is being called: no padding


class Logits(Tensor):
    """A tensor (b, l, v): `[:, -1]` costs nothing, every other operation first makes the whole, as `run` would give it.

    Args:
        last: (b, v) at the last position. length: l. whole: makes (b, l, v).
    Source: torch's wrapper subclasses (a tensor without numbers of its own). Python's calls are passed on before
        autograd sees them, so that views count what is written into them; what torch calls by itself, below it.
    """

    last: Tensor
    make: Callable[[], Tensor]
    held: Tensor | None
    when_made: int

    @staticmethod
    def __new__(cls, last: Tensor, length: int, whole: Callable[[], Tensor]) -> "Logits":
        b, v = last.shape
        made: Logits = Tensor._make_wrapper_subclass(cls, (b, length, v), dtype=last.dtype, device=last.device)
        made.last, made.make, made.held = countable(last), whole, None
        return made

    def whole(self) -> Tensor:
        """(b, l, v), made once."""
        if self.held is None:
            self.held = countable(self.make())
            self.when_made = self.held._version
        return self.held

    def __getitem__(self, where: Any) -> Tensor:
        rows, pos, *more = where if isinstance(where, tuple) and len(where) > 1 else (None, None)
        if isinstance(rows, slice) and rows == slice(None) and type(pos) is int and pos in (-1, self.shape[1] - 1):
            return self.last[(rows, *more)]
        return self.whole()[where]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in FORM:
            return super().__torch_function__(func, types, args, kwargs)
        return _of_the_whole(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _of_the_whole(func, args, kwargs)


def _of_the_whole(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Any:
    args, kwargs = tree_map_only(Logits, lambda logits: logits.whole(), (args, dict(kwargs or {})))
    return func(*args, **kwargs)


def countable(x: Tensor) -> Tensor:
    """The tensor, or under inference mode a copy, of which `written` can tell."""
    if isinstance(x, Logits) or not x.is_inference():
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.clone()


def written(logits: Tensor) -> int:
    """How often something was written into logits, or into what they gave away."""
    if not isinstance(logits, Logits):
        return logits._version
    whole = 0 if logits.held is None else logits.held._version - logits.when_made
    return logits.last._version + whole
