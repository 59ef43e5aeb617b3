"""The errors of `minimal_mamba`, `kernels_bridge` and `interp`: what was asked, what is true here, what to do.

All share one base, `MambascopeError`, and each is also the builtin that a caller would expect.
"""

import difflib
from collections.abc import Iterable, Sequence


class MambascopeError(Exception):
    """Base of every error that mambascope raises on purpose."""

    def __str__(self) -> str:  # KeyError would show its message in quotes
        return " ".join(str(a) for a in self.args)


class ConfigError(MambascopeError, ValueError):
    """A configuration that this model does not implement or that contradicts itself."""


class CheckpointError(MambascopeError, ValueError):
    """A checkpoint whose tensors or files do not fit the model."""


class InputError(MambascopeError, ValueError):
    """Token ids, lengths or a carried state that the model cannot run on."""


class UnknownSiteError(MambascopeError, AttributeError):
    """A site, or a field of an address, that does not exist."""


class AddressError(MambascopeError, IndexError):
    """A layer, position, channel or row that this run does not have."""


class EditError(MambascopeError, ValueError):
    """An edit that has no meaning: a NaN value, an operation that its site does not allow."""


class ShapeMismatch(MambascopeError, ValueError):
    """A value whose shape is not that of the place it should go to."""


class NotReached(MambascopeError, RuntimeError):
    """An edit or a recording was asked for and did not happen during the run."""


class NotRecorded(MambascopeError, KeyError):
    """A value was read from a run that did not record it."""


class BackendUnavailable(MambascopeError, RuntimeError):
    """A backend was asked for by name and cannot run here, or for what it does not have."""


class MissingExtra(MambascopeError, ImportError):
    """A package of one of mambascope's extras is not installed."""


class MetricError(MambascopeError, ValueError):
    """A metric that does not give one number a row, gives one without a gradient, or changes the logits."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause ` Did you mean '...'?`, or nothing where no known name is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def of_type(name: str, given: object, kind: type, source: str) -> None:
    """Raise InputError for an argument of another type: what was given, what is meant, and what makes it."""
    if not isinstance(given, kind):
        raise InputError(f"{name} is a {type(given).__name__}; give the {kind.__name__} {source}.")


def all_of_type(name: str, given: object, kind: type, source: str) -> None:
    """Raise InputError for what is no sequence of at least one thing of a type."""
    if not isinstance(given, Sequence):
        raise InputError(f"{name} is a {type(given).__name__}; give a list, each the {kind.__name__} {source}.")
    if not given:
        raise InputError(f"{name} is empty; give at least one {kind.__name__} {source}.")
    for i, one in enumerate(given):
        of_type(f"{name}[{i}]", one, kind, source)
