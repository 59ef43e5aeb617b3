"""How values that hold tensors are printed: by type and shape, where the numbers would fill a screen."""

from dataclasses import fields
from typing import Any

from torch import Tensor

FEW = 8  # numbers of a tensor that are printed


class Brief:
    """A dataclass (with repr=False) that prints its large tensors as, for instance, float32[2, 8, 16]."""

    def __repr__(self) -> str:
        parts = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"


def _brief(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 1 and all(isinstance(v, Tensor) for v in value):
        return f"{len(value)} of {_brief(value[0])}"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dim() < 2 and value.numel() <= FEW and value.device.type != "meta":
        return str([float(f"{x:.4g}") if isinstance(x, float) else x for x in value.reshape(-1).tolist()])
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
