"""What can go wrong in this study."""

from minimal_mamba.errors import MambascopeError


class TaskError(MambascopeError, ValueError):
    """A task, a length or a number of samples that has no meaning."""


class TokenizerError(MambascopeError, ValueError):
    """Text or ids with no place in the vocabulary."""


class TrainingError(MambascopeError, ValueError):
    """Settings that cannot be trained, or a run folder that does not fit them."""


class OrganismError(MambascopeError, ValueError):
    """A model of the study that does not exist here, or whose folder is not whole."""
