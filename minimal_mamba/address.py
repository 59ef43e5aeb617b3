"""Addresses: `at.ssm_state(layer=3, pos=7)` names a place in a run. A frozen value, hashable, printable.

An int drops its axis from the recorded value; a slice or a list keeps it, the layer's axis first:
`at.ssm_state(layer=3, pos=7)` is (b, e, n), `at.ssm_state(layer=[1, 3], pos=slice(4))` is (2, b, 4, e, n).
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import AddressError, EditError, UnknownSiteError, nearest
from .sites import ADDRESSABLE, Site


@dataclass(frozen=True)
class Span:
    """A slice that can be hashed (Python's can only from 3.12 on)."""

    start: int | None
    stop: int | None
    step: int | None

    def __str__(self) -> str:
        ends = f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"
        return ends if self.step is None else f"{ends}:{self.step}"

    @property
    def from_end(self) -> bool:
        """Whether it starts at an offset from the end."""
        return self.start is not None and self.start < 0

    def indices(self, size: int) -> list[int]:
        """The indices that the slice selects of an axis of this size."""
        return list(range(size)[slice(self.start, self.stop, self.step)])


Selector = int | tuple[int, ...] | Span
EVERYTHING = Span(None, None, None)


def selector(value: Any, what: str) -> Selector:
    """Normalise an int, slice or iterable of ints, of torch or numpy too; anything else raises AddressError."""
    if isinstance(value, Span):
        return value
    if isinstance(value, slice):
        try:
            ends = [None if v is None else operator.index(v) for v in (value.start, value.stop, value.step)]
        except TypeError:
            raise AddressError(f"{what}={value}: a slice is between ints.") from None
        if ends[2] is not None and ends[2] < 1:
            raise AddressError(f"{what}={value}: a slice's step is positive.")
        return Span(*ends)
    if hasattr(value, "tolist"):  # a tensor or an array: of no axes an int, of one axis a list
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        items = tuple(selector(v, what) for v in value)
        if not items or not all(isinstance(v, int) for v in items):
            raise AddressError(f"{what}={value!r}: a list holds at least one int, and ints only.")
        if len(set(items)) != len(items):
            raise AddressError(f"{what}={value!r} names the same index twice.")
        return items  # type: ignore[return-value]
    if isinstance(value, bool):
        raise AddressError(f"{what}={value}: give an int, a slice or a list of ints, not bools; of a mask its indices.")
    try:
        return operator.index(value)
    except TypeError:
        raise AddressError(f"{what}={value!r}: give an int, a slice or a list of ints.") from None


def row_selector(rows: Any) -> tuple[int, ...] | Span:
    """`selector` of rows, whose axis an int does not drop."""
    chosen = selector(rows, "rows")
    return (chosen,) if isinstance(chosen, int) else chosen


def resolve(sel: Selector, size: int, what: str) -> list[int]:
    """The non-negative indices that a selector means on an axis of this size; raises AddressError outside it."""
    if isinstance(sel, Span):
        found = sel.indices(size)
        if not found:
            raise AddressError(f"{what}: the slice {sel} selects nothing; there are indices 0..{size - 1}.")
        return found
    wanted = (sel,) if isinstance(sel, int) else sel
    for i in wanted:
        if not -size <= i < size:
            raise AddressError(f"{what}={i} does not exist here: there are indices 0..{size - 1}.")
    found = [i % size for i in wanted]
    if len(set(found)) != len(found):
        raise AddressError(f"{what}={list(wanted)} names the same index twice: there are {size}.")
    return found


@dataclass(frozen=True)
class Address:
    """A site, with the layers, positions and channels that are meant. Make it with `at`."""

    site: str
    layer: Selector | None
    pos: Selector
    features: tuple[Selector, ...]  # one a feature axis, in the order of the site's axes

    @property
    def spec(self) -> Site:
        """The site's row in the table."""
        return ADDRESSABLE[self.site]

    @property
    def layer_axis(self) -> bool:
        """Whether what it records has an axis of layers, in front: where a slice or a list names them."""
        return isinstance(self.layer, Span | tuple)

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"layer={shown(self.layer)}"]
        parts.append(f"pos={shown(self.pos)}")
        chosen = zip(self.spec.features, self.features, strict=True)
        parts += [f"{axis}={shown(s)}" for axis, s in chosen if s != EVERYTHING]
        return f"{self.site}({', '.join(parts)})"

    __repr__ = __str__


def shown(sel: Selector) -> str:
    """A selector as it was written."""
    return str(list(sel)) if isinstance(sel, tuple) else str(sel)


class _At:
    """`at.<site>(layer=, pos=, ...)`, with a field for each feature axis of the site (`e=`, `n=`, ...)."""

    def __getattr__(self, name: str) -> "_SiteAt":
        if name not in ADDRESSABLE:
            raise UnknownSiteError(f"no site {name!r}.{nearest(name, ADDRESSABLE)} All: {', '.join(ADDRESSABLE)}.")
        return _SiteAt(ADDRESSABLE[name])

    def __dir__(self) -> list[str]:
        return sorted(ADDRESSABLE)


class _SiteAt:
    def __init__(self, site: Site):
        self._site = site
        self.__doc__ = f"{site.meaning} ({site.axes})"

    def __call__(self, *unnamed: Any, **fields: Any) -> Address:
        site = self._site
        known = [*(["layer"] if site.layered else []), "pos", *(f for f in site.features if f != "n+k")]
        if unnamed:
            named = ", ".join(f"{name}={value!r:.40}" for name, value in zip(known, unnamed, strict=False))
            raise AddressError(
                f"at.{site.name}({', '.join(f'{v!r:.40}' for v in unnamed)}): name the fields, as in "
                f"at.{site.name}({named}). It has {', '.join(known)}."
            )
        for name in fields:
            if name not in known:
                hint = nearest(name, known)
                raise UnknownSiteError(f"{site.name} has no field {name!r}.{hint} It has {', '.join(known)}.")
        chosen = {k: selector(v, k) for k, v in fields.items()}
        return Address(
            site.name,
            chosen.get("layer", EVERYTHING) if site.layered else None,
            chosen.get("pos", EVERYTHING),
            tuple(chosen.get(f, EVERYTHING) for f in site.features),
        )

    def __repr__(self) -> str:
        return f"at.{self._site.name}: ({self._site.axes}) {self._site.meaning}"


at = _At()


def address_of(site: str, layer: Any = None, **fields: Any) -> Address:
    """`at.<site>(layer=, ...)` of a site by its name; None for the layer where the site has none."""
    address: Address = getattr(at, site)(**fields if layer is None else {"layer": layer, **fields})
    return address


def named_site(site: object) -> None:
    """Raise EditError for what is not the name of a site."""
    if isinstance(site, Address):
        raise EditError(f"site={site}: give the name, {site.site!r}; layers and positions are arguments of their own.")
    if not isinstance(site, str) or site not in ADDRESSABLE:
        raise EditError(f"site={site!r} is no site.{nearest(str(site), ADDRESSABLE)}")
