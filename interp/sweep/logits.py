"""Logits of which the last position is there, and the rest is made if a metric asks for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class Logits(Tensor):
    """A tensor (b, l, v): `[:, -1]` costs nothing, every other operation first makes the whole, as `run` would give it.

    Args:
        last: (b, v) at the last position. length: l. whole: makes (b, l, v).
    Source: torch's wrapper subclasses (a tensor without numbers of its own, which sees every operation on it).
    """

    last: Tensor
    whole: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, last: Tensor, length: int, whole: Callable[[], Tensor]) -> "Logits":
        b, v = last.shape
        made: Logits = Tensor._make_wrapper_subclass(cls, (b, length, v), dtype=last.dtype, device=last.device)
        made.last, made.whole = last, whole
        return made

    def __getitem__(self, where: Any) -> Tensor:
        rows, pos, *more = where if isinstance(where, tuple) and len(where) > 1 else (None, None)
        if rows == slice(None) and type(pos) is int and pos in (-1, self.shape[1] - 1):
            return self.last[(rows, *more)]
        return self.whole()[where]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Logits, lambda logits: logits.whole(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)
