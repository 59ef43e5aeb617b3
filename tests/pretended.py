"""A CUDA device that is none: its tensors compute on the CPU, and refuse to meet others as they would on a GPU.

`cuda_on_cpu/pretended.cpp`, which the second environment has compiled, must be loaded before torch is imported; where
there is none, as in the first environment, importing this does nothing, and `HERE` is False.

Refused as by torch: tensors of two devices in one operation (but an index of the CPU, and numbers without axes),
numpy's view of a tensor that is there, a generator of one device that draws on the other.
"""

import ctypes
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIBRARY = Path(sysconfig.get_path("purelib")) / "pretended_cuda.so"
HERE = LIBRARY.exists()
if HERE:
    ctypes.CDLL(str(LIBRARY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
ON_IT: set[int] = set()  # generators
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class There(Tensor):
    """A tensor on the device. `here`: its numbers."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="cuda:0", **layout)

    def __init__(self, here: Tensor):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return compute(func, args, kwargs or {})

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def numpy(self, **how: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *how: Any) -> Any:
        return self.numpy()


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Generator(torch.Generator):
    """torch loses the class of a generator on its way into an operation, but not its address (`ON_IT`)."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        (ON_IT.add if torch.device(device).type == "cuda" else ON_IT.discard)(made._cdata)
        return made


def here(x: Any) -> Any:
    """The numbers of a tensor that is there; what else there is, as it is."""
    return x.here if isinstance(x, There) else x


def there(x: Any) -> Any:
    """A tensor, there; what else there is, as it is."""
    return There(x) if isinstance(x, Tensor) else x


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation of torch: refused where a GPU would, else computed here."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    others = [t for t in given if not isinstance(t, There)]
    device = kwargs.get("device")
    goes_there = len(others) < len(given) if device is None else torch.device(device).type == "cuda"
    generator = kwargs.get("generator")
    if generator is not None and goes_there != (generator._cdata in ON_IT):
        raise RuntimeError(f"{func}: the generator is on another device than what it draws")
    if len(others) == len(given) and not goes_there:
        return func(*args, **kwargs)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if 0 < len(others) < len(given) and not moves:
        _refuse(func, args, others)
    out = func(*tree_map(here, args), **tree_map(here, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if moves or device is not None:
        return tree_map(there, out) if goes_there else out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(there, out))


def _refuse(func: Any, args: Any, others: list[Tensor]) -> None:
    indexed = func._schema.name in INDEXED
    if indexed:
        if not isinstance(args[0], There):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        others = [t for t in args[2:3] if isinstance(t, Tensor) and not isinstance(t, There)]
    numbers = indexed or torch.Tag.pointwise in func.tags or "fill" in func._schema.name
    if any(t.dim() or not numbers for t in others):
        shapes = ", ".join(str(tuple(t.shape)) for t in others)
        raise RuntimeError(f"{func}: tensors on cuda:0 and cpu, those on the cpu of shapes {shapes}")


CUDA = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *how: True,
    "current_device": lambda: 0,
}


@contextmanager
def pretended() -> Iterator[None]:
    """A CUDA device is there."""
    before, generator = {name: getattr(torch.cuda, name) for name in CUDA}, torch.Generator
    swap, lift = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    try:
        for name, function in CUDA.items():
            setattr(torch.cuda, name, function)
        torch.Generator = _Generator  # type: ignore[misc]
        torch.__future__.set_swap_module_params_on_conversion(True)  # else a weight would lose its class
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor would go to the device by itself
        with _Mode():
            yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)
        torch.Generator = generator  # type: ignore[misc]
        torch.__future__.set_swap_module_params_on_conversion(swap)
        torch._C._set_only_lift_cpu_tensors(lift)
