"""The tap: the argument that the forward calls at every site, as in `x = tap("x", x)`."""

from collections.abc import Sequence

from torch import Tensor


class Tap:
    """A tap that changes and records nothing; `Plan` is the one that does.

    Positions here are local: 0 is the first token of this call of the model.
    """

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

    def recorded(self, *sites: str) -> list[int]:
        """The positions at which one of these sites of this layer is recorded, ascending."""
        return []

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        """Hand over the values (b, len(times), ...) of positions that no edit touches."""

    def probed(self, times: Sequence[int]) -> tuple[list[int], Tensor] | None:
        """Which of these positions take a gradient in `ssm_state` or `state_write`, and the zeros to add to the state.

        Returns:
            p positions, ascending, and (b, p, e, n), to be added to the state as a write of these positions: the sum of
            all probes, whose gradients are asked for later. None where no position takes one.
        """
        return None

    def touches(self, *sites: str) -> bool:
        """Whether an edit or a recording names one of these sites."""
        return False


NO_TAP = Tap()
