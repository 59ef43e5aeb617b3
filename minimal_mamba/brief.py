"""How values that hold tensors are printed: by type and shape, where the numbers would fill a screen; and copied."""

from copy import deepcopy
from dataclasses import fields
from typing import Any

from torch import Tensor

from .errors import InputError

FEW = 8  # numbers of a tensor that are printed


class Brief:
    """A dataclass (with repr=False) that prints its large tensors as, for instance, float32[2, 8, 16]."""

    def __repr__(self) -> str:
        parts = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Brief":
        made = object.__new__(type(self))
        try:
            vars(made).update((name, deepcopy(value, memo)) for name, value in vars(self).items())
        except RuntimeError as error:
            if "support the deepcopy protocol" not in str(error):
                raise
            raise InputError(
                f"deepcopy of a {type(self).__name__} whose tensors keep what their gradients need, which torch copies "
                "for no tensor: make it under torch.no_grad(), or copy the numbers, as in tensor.detach().clone()."
            ) from None
        return made


def _brief(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 1 and all(isinstance(v, Tensor) for v in value):
        return f"{len(value)} of {_brief(value[0])}"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dim() < 2 and value.numel() <= FEW and value.device.type != "meta":
        return str([float(f"{x:.4g}") if isinstance(x, float) else x for x in value.reshape(-1).tolist()])
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
