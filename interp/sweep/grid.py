"""`Grid`: the numbers of a patch sweep, their normalisation and their uncertainty."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import InputError

Layers = int | tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Brief):
    """A sweep's numbers, in the unit of its metric.

    Args:
        values: (layers, positions, b), or with parts (layers, positions, parts, b): the metric of the base run under
            one patch.
        base, donor: (b,) the metric of the two runs without a patch; NaN for a donor that there is not.
        site: the site that was patched.
        layers: of each of the grid's rows, a layer or the layers patched together.
        positions: of each column; a negative one, where the batch's lengths differ, counts from each row's own end.
        parts: the names of the channels, dimensions or bands that were patched one by one; None: the whole site.
        noising: the same patches the other way round, the base run's values put into the donor run, if asked for; its
            `base` is this grid's `donor`.
    """

    values: Tensor
    base: Tensor
    donor: Tensor
    site: str
    layers: tuple[Layers, ...]
    positions: tuple[int, ...]
    parts: tuple[str, ...] | None = None
    noising: "Grid | None" = None

    def effect(self) -> Tensor:
        """values - base, (layers, positions, [parts,] b)."""
        return self.values - self.base

    def recovered(self) -> Tensor:
        """(layers, positions, [parts]): mean(values - base) / mean(donor - base); 0 is the base run, 1 the donor.

        The ratio of means, not the mean of ratios, which a single pair with a small gap would rule.
        """
        return self.effect().mean(-1) / self._gap()

    def recovered_error(self) -> Tensor:
        """(layers, positions, [parts]): one standard error of `recovered`, over the rows (delta method)."""
        residual = self.effect() - self.recovered()[..., None] * (self.donor - self.base)
        return standard_error(residual) / self._gap().abs()

    def interval(
        self, level: float = 0.95, *, normalise: bool = True, draws: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Ends of the bootstrap interval of `recovered`, or of the mean effect, over the rows of the batch.

        Args:
            level: the share of the draws that lie inside, 0 to 1.
            normalise: of `recovered()`; False: of the mean effect.
            draws, seed: of the batches drawn with replacement, the same for all cells.
        Returns:
            low, high: (layers, positions, [parts]).
        Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentile interval).
        """
        b = _rows(self.base, "an interval")
        if not 0 < level < 1:
            raise InputError(f"level={level}: a share between 0 and 1, such as 0.95.")
        effect = self.effect()
        drawn = torch.randint(0, b, (draws, b), generator=torch.Generator().manual_seed(seed))
        share = torch.zeros(draws, b).scatter_add(1, drawn, torch.ones(draws, b)) / b
        share = share.to(effect)
        means = effect @ share.T  # (layers, positions, [parts], draws)
        if normalise:
            self._gap()
            means = means / ((self.donor - self.base) @ share.T)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(means)
        low, high = means.quantile(ends, -1)
        return low, high

    def _gap(self) -> Tensor:
        gap = (self.donor.to(wide(self.donor.dtype)) - self.base).mean()
        if bool(self.donor.isnan().all()):
            raise InputError(
                "this sweep has no donor to normalise by: give donor_ids, or take effect(), or normalise=False of "
                "interval() and heatmap()."
            )
        if vanishes(gap, self.base, self.donor):
            raise InputError(
                f"the donor's metric does not differ from the base's (mean gap {gap.item():.2g}): "
                "nothing to normalise by."
            )
        return gap


def standard_error(values: Tensor) -> Tensor:
    """(...): of the mean over the rows of the batch, values (..., b); InputError for a single row."""
    b = _rows(values, "a standard error")
    return values.std(-1) / b**0.5


def _rows(values: Tensor, what: str) -> int:
    b = values.shape[-1]
    if b < 2:
        raise InputError(f"{what} needs at least 2 rows; there is {b}.")
    return b


def vanishes(gap: Tensor, base: Tensor, donor: Tensor) -> bool:
    """Whether a mean difference of two metrics is no number, or no more than a few roundings of them."""
    # one step of a metric in 16 bits is large, and a difference all the same; its sums are in 32
    rounding = max(1e-9, 16 * torch.finfo(wide(gap.dtype)).eps)
    return not gap.isfinite() or bool(gap.abs() <= rounding * (base.abs() + donor.abs()).mean())
