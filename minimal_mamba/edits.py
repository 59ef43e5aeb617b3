"""Edits are values: what to put where, as frozen objects that can be printed, compared, saved and replayed.

`Set`, `Add`, `Scale`, `Zero`, `Mean`, `Project`, `Apply`. Edits of one place compose in the order given. A value has
the shape that its address records (with `rows=`, that many rows), or it may be one number, or have size 1 on some axes,
or only the feature axes; nothing else is broadcast. Values are copied when the edit is made and stay differentiable.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .address import Address, Selector, row_selector, shown
from .errors import EditError
from .sites import RECURRENT_STATE

Rows = Selector | Sequence[int] | None


def _value(given: Any, what: object) -> Tensor:
    """A private copy that keeps its gradient, free of NaN."""
    with torch.enable_grad():
        try:
            if isinstance(given, list | tuple) and any(isinstance(v, Tensor) for v in given):
                given = torch.stack([torch.as_tensor(v) for v in given])  # torch.tensor would drop their gradients
            if "complex" in str(getattr(given, "dtype", "")):
                raise TypeError("it is complex")
            if not isinstance(given, Tensor):
                given = torch.tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise EditError(f"{what}: {given!r:.80} is no real tensor or number ({error}).") from None
        value: Tensor = given.clone()
    if not value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    if value.detach().sum().isnan() and torch.isnan(value).any():  # the sum is one fast look
        raise EditError(
            f"{what}: the value holds NaN ({int(torch.isnan(value).sum())} of {value.numel()} numbers). If it was "
            "recorded: positions that a padded row does not have are recorded as NaN; use nan_to_num() where they are "
            "never written."
        )
    return value


def cast(source: object, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in the type of its place.

    Raises:
        EditError: a finite number is infinite there.
    """
    made = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max and bool((made.isinf() & value.isfinite()).any()):
        raise EditError(
            f"{source}: a finite value, up to {float(value.detach().abs().max()):.3g}, is infinite in this place's "
            f"type {dtype}, which ends at {torch.finfo(dtype).max:.3g}."
        )
    return made


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of all edits: where (`address`), and on which rows of the batch (`rows`, all if None)."""

    address: Address
    rows: Rows = field(default=None, kw_only=True)
    tensor: ClassVar[str | None] = None  # the field that holds a tensor
    optional: ClassVar[bool] = False  # whether that field may be None
    by_element: ClassVar[bool] = True  # whether each number changes by itself

    def __post_init__(self) -> None:
        if not isinstance(self.address, Address):
            raise EditError(f"{type(self).__name__}: {self.address!r} is no address; make one with at.<site>(...).")
        if self.rows is not None:
            object.__setattr__(self, "rows", row_selector(self.rows))
        if self.tensor and not (self.optional and self.value is None):
            object.__setattr__(self, self.tensor, _value(self.value, self))
        if self.address.site == RECURRENT_STATE.name and not self.by_element:
            raise EditError(
                f"{self}: recurrent_state is two sites that the forward passes at different times, so "
                f"{type(self).__name__} cannot see both at once. Edit at.ssm_state and at.conv_state."
            )

    @property
    def value(self) -> Tensor | None:
        """The edit's tensor, if its kind has one."""
        return getattr(self, self.tensor) if self.tensor else None

    @property
    def blind(self) -> bool:
        """Whether what it puts in place does not depend on what is there."""
        return isinstance(self, Set | Zero) or (isinstance(self, Mean) and self.mean is not None)

    @property
    def over_batch(self) -> bool:
        """Whether what it puts in place depends on what other rows hold there."""
        return isinstance(self, Mean) and self.mean is None

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        """What replaces `old` (rows, [positions,] features), given this place's share of the value."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The fields beside address, rows and tensor."""
        skip = {"address", "rows", self.tensor}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Edit):
            return NotImplemented
        if self._key() != other._key():
            return False
        mine, theirs = self.value, other.value
        if mine is None or theirs is None:
            return mine is theirs
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and bool(torch.equal(mine, theirs))

    def __hash__(self) -> int:
        return hash((type(self).__name__, *self._key()))

    def _key(self) -> tuple[Any, ...]:
        return (self.address, self.rows, *self.describe().items())

    def __str__(self) -> str:
        parts = [str(self.address)]
        if isinstance(self.value, Tensor):
            parts.append(f"value {tuple(self.value.shape)}")
        parts += [f"{k}={v!r}" for k, v in self.describe().items()]
        if self.rows is not None:
            parts.append(f"rows={shown(row_selector(self.rows))}")
        return f"{type(self).__name__}({', '.join(parts)})"

    __repr__ = __str__


@dataclass(frozen=True, eq=False, repr=False)
class Set(Edit):
    """Put `to` in place of what is there."""

    to: Tensor
    tensor = "to"

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        assert value is not None
        return value.expand_as(old).clone()  # a place of its own: what runs on may be changed, the edit may not


@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """Add `what` to what is there."""

    what: Tensor
    tensor = "what"

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        assert value is not None
        return old + value


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply what is there by `factor`."""

    factor: Tensor
    tensor = "factor"

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        assert value is not None
        return old * value


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Put zeros in place of what is there."""

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        return torch.zeros_like(old)


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Put the mean over the whole batch in place of what is there, or a given `mean`.

    The batch's mean is that of all rows that have the position, also of rows that `rows` leaves alone.
    """

    mean: Tensor | None = None
    tensor = "mean"
    optional = True

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        return (mean() if value is None else value).expand_as(old).clone()


@dataclass(frozen=True, eq=False, repr=False)
class Project(Edit):
    """Remove a subspace of the feature axes, or keep nothing else.

    `basis` (m, features): m independent directions, in the shape that one row and position of the address records;
    they need not be orthonormal.
    """

    basis: Tensor
    keep: bool = field(default=False, kw_only=True)
    tensor = "basis"
    by_element = False

    def __post_init__(self) -> None:
        if not isinstance(self.keep, bool):
            raise EditError(f"Project: keep={self.keep!r} is no bool; True keeps only the subspace, False removes it.")
        super().__post_init__()
        flat = self.basis.detach().flatten(1) if self.basis.dim() > 1 else None
        if flat is None or flat.shape[0] > flat.shape[1] or torch.linalg.matrix_rank(flat.double()) < flat.shape[0]:
            raise EditError(f"{self}: a basis is (m, features), with m linearly independent directions.")

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        assert value is not None
        directions = value.flatten(1)  # (m, f)
        axes = old.dim() - (value.dim() - 1)
        flat = old.flatten(axes) if value.dim() > 1 else old  # (..., f)
        w = torch.promote_types(old.dtype, torch.float32)
        q, _ = torch.linalg.qr(cast(self, directions.T, w))  # (f, m)
        inside = (flat.to(w) @ q @ q.T).reshape(old.shape).to(old.dtype)
        return inside if self.keep else old - inside


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Edit):
    """Put `fn(value)` in place of what is there.

    `fn` sees one layer at a time: (rows, positions, features) along the sequence (an int position drops its axis), and
    (rows, features), one position after the other, for sites inside the recurrence (`SITES[...].per_position`). Where
    rows have unequal numbers of the positions, it sees one row and its own positions a call, (1, positions, features).
    So `fn` must treat rows independently; and positions too, for a slice that decoding or a run in pieces may cut. It
    returns a floating-point tensor of the shape that it was given; NaN is allowed.
    """

    fn: Callable[[Tensor], Tensor]
    by_element = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise EditError(f"Apply: {self.fn!r} is no function; give one that maps a tensor to a tensor of its shape.")
        super().__post_init__()

    def new(self, old: Tensor, value: Tensor | None, mean: Callable[[], Tensor]) -> Tensor:
        return self.on(old)

    def on(self, old: Tensor) -> Tensor:
        """`fn(old)`, checked, in the type of `old`."""
        made = self.fn(old.clone())  # a function that works in place changes its copy: `old` may also be read elsewhere
        if not isinstance(made, Tensor) or made.shape != old.shape or not made.is_floating_point():
            got = f"{tuple(made.shape)} of {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
            raise EditError(
                f"{self}: the function must return shape {tuple(old.shape)}, it returned {got}; "
                "its type must be floating point."
            )
        return cast(self, made, old.dtype)


def edit_or_address(given: object) -> Edit | Address:
    """What is given; raises EditError for what is neither."""
    if not isinstance(given, Edit | Address):
        raise EditError(
            f"{given!r:.80} is neither an edit nor an address; edits are Set, Add, ..., addresses at.<site>(...), and "
            "() is none."
        )
    return given


KINDS: dict[str, type[Edit]] = {kind.__name__: kind for kind in (Set, Add, Scale, Zero, Mean, Project, Apply)}


def function_name(fn: Callable[..., Any]) -> str:
    """`module:qualname` under which a function can be imported again; raises EditError if it cannot."""
    name = f"{getattr(fn, '__module__', None)}:{getattr(fn, '__qualname__', None)}"
    try:
        if name.startswith(("__main__:", "None:")) or import_function(name) is not fn:
            raise EditError
    except (EditError, ImportError, AttributeError):
        raise EditError(
            f"Apply({name}) cannot be saved: its function cannot be imported by name. Move it to the top level of a "
            "module other than __main__. Of a builtin, such as torch.relu, name the Python function, such as "
            "torch.nn.functional.relu, or wrap it, like a partial or a method, in a function of such a module."
        ) from None
    return name


def import_function(name: str) -> Callable[..., Any]:
    """The function that `function_name` named."""
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
