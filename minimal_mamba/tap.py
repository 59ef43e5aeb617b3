"""The tap: the argument that the forward calls at every site, as in `x = tap("x", x)`."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScanInputs:
    """What the states of a layer in some run can be made from again.

    Args:
        u, dt: (b, l, e). B: (b, l, n). h: (b, e, n) the state before the first token.
    """

    u: Tensor
    dt: Tensor
    B: Tensor
    h: Tensor


@dataclass(frozen=True)
class Toward:
    """A site of the scan, moved from one run's values (the base's) toward another's (the donor's), at all positions.

        site_t + size_t (donor_t - base_t)

    The size is zero and changes nothing. Its gradient is what is wanted: dL/dsite times (donor - base), summed over the
    axes along which the size is 1. A scan can make it block by block, without the site being held at all positions.

    Args:
        site: decay, state_write, ssm_state or state_read.
        size: (b, l, e or 1, n or 1) zeros.
        runs: the donor's and the base's; or the donor's alone, where the base is the present run.
    """

    site: str
    size: Tensor
    runs: tuple[ScanInputs, ...]


class Tap:
    """A tap that changes and records nothing; `Plan` is the one that does.

    Positions here are local: 0 is the first token of this call of the model. `last_only` says that after the scan of
    this layer only the last token of each row is wanted.
    """

    last_only = False

    def begin(self, start: Tensor, lengths: Tensor) -> None:
        """Called once a forward: row i holds the positions start[i] .. start[i] + lengths[i] - 1."""

    def at_layer(self, layer: int) -> "Tap":
        """The tap of one layer."""
        return self

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        """The value of a site after edits: whole (b, l, ...), or (b, ...) at position t for sites per position."""
        return value

    def edited(self, *sites: str) -> list[int]:
        """The positions that need a readable step because of one of these sites of this layer, ascending.

        Every edit needs one. A gradient needs one too, unless it is wanted in `ssm_state` or `state_write`: for those a
        scan adds what `probed` gives to its state.
        """
        return []

    def only_probed(self, *sites: str) -> list[int]:
        """The positions at which a gradient in these sites is wanted and no edit acts, so that `probed` can serve."""
        return []

    def overwritten(self) -> list[int]:
        """The positions at which edits replace the whole `ssm_state` in all rows, ascending.

        What the state would have been there does not matter, so it need not be made: no function looks at it, and
        `decay` and `state_write` are neither edited there nor take a gradient.
        """
        return []

    def recorded(self, *sites: str) -> list[int]:
        """The positions at which one of these sites of this layer is recorded, ascending."""
        return []

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        """Take the values (b, len(times), ...) of recorded positions that no edit touches."""

    def room(self, site: str, times: Sequence[int], like: Tensor) -> Tensor | None:
        """Memory into which an operation can write what it will give to `record`, which spares a copy.

        Args:
            times: the positions. like: (b, ...), the value of one position.
        Returns:
            (b, len(times), ...), or None: take memory of your own.
        """
        return None

    def probed(self, times: Sequence[int], *sites: str) -> tuple[list[int], Tensor] | None:
        """Which of these positions take a gradient in `ssm_state` or `state_write`, and the zeros to add to the state.

        Args:
            sites: others of one shape, such as `conv_state`, instead.
        Returns:
            p positions, ascending, and (b, p, e, n), to be added to the state as a write of these positions: the sum of
            all probes, whose gradients are asked for later. None where no position takes one.
        """
        return None

    def toward(self) -> Toward | None:
        """The move of this layer whose gradient is wanted; asked for by a scan that honours it."""
        return None

    def touches(self, *sites: str) -> bool:
        """Whether an edit, a recording or a gradient names one of these sites at a position of this call of the model.

        Of a layer's tap, in this layer. Before the first call: at any position. A tap that does something and does not
        say where is taken to touch everything.
        """
        return type(self).__call__ is not Tap.__call__


NO_TAP = Tap()
