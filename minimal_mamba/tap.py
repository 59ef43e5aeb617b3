"""The tap: the argument that the forward calls at every site, as in `x = tap("x", x)`."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScanInputs:
    """What a run's scan is remade from: u, dt (b, l, e) and B (b, l, n) of a layer, h (b, e, n) before the first."""

    u: Tensor
    dt: Tensor
    B: Tensor
    h: Tensor


@dataclass(frozen=True)
class Toward:
    """A move of one site of the scan from one run toward another, at every position at once.

        site_t + size_t (donor_t - base_t)

    The size is zero and changes nothing; its gradient is dL/dsite times (donor - base), summed over the axes along
    which the size is 1. A scan can give it block by block, so that no site is held for all positions.

    Args:
        site: decay, state_write, ssm_state or state_read.
        size: (b, l, e or 1, n or 1) zeros.
        runs: of the run to move to and of the one to move from; of the former alone: from the present run's site.
    """

    site: str
    size: Tensor
    runs: tuple[ScanInputs, ...]


class Tap:
    """A tap that changes and records nothing; `Plan` is the one that does.

    Positions here are local: 0 is the first token of this call of the model.
    `last_only`: behind the scan of this layer only the last token of each row is wanted.
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
        """The positions that need a readable step for one of these sites of this layer, ascending.

        Those of its edits, and of gradients wanted in it; not of gradients in `ssm_state` and `state_write`, which a
        scan can take by adding what `probed` gives.
        """
        return []

    def only_probed(self, *sites: str) -> list[int]:
        """The positions at which gradients in these sites are wanted and no edit acts: `probed` can serve them too."""
        return []

    def overwritten(self) -> list[int]:
        """Those positions whose edits put a state in place of whatever `ssm_state` was there, in all rows, ascending.

        What `ssm_state` becomes there does not depend on what the tap is given, and neither `decay` nor `state_write`
        is edited or takes a gradient.
        """
        return []

    def recorded(self, *sites: str) -> list[int]:
        """The positions at which one of these sites of this layer is recorded, ascending."""
        return []

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        """Hand over the values (b, len(times), ...) of positions that no edit touches."""

    def room(self, site: str, times: Sequence[int], like: Tensor) -> Tensor | None:
        """Where the values (b, len(times), ...) of positions that no edit touches can be written, to be handed to
        `record` in place; `like` (b, ...) is of their type. None: in memory of your own.
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
