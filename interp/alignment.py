"""Distributed alignment search: the k-dimensional subspace of a site that, swapped, hands over a hidden value.

    x' = x + s Q^T Q (x_donor - x) / s        Q (k, features), orthonormal; s (features), 1 unless scales are asked for

Q is found by gradient descent on what x' makes the model answer: what the donor's hidden value demands of the base's
prompt. It is fitted on some pairs of prompts and scored on others, beside the controls:

    nothing    nothing swapped: the floor
    whole      the whole site swapped: the ceiling, of any k
    searched   the whole space that is searched swapped: the ceiling under `dims`
    random     as many random dimensions of the space that is searched
    shuffled   found, and scored, for answers that were given to other pairs: chance
    forced     the same on the pairs that it was found on: what the optimiser makes of nothing
    varying    Q without what leads out of the principal directions, of those that are searched, that hold 99 % of the
               mean square of x_donor - x, in the units of the swap

What it shows: that so many dimensions suffice, of all pairs like these. What it does not:

- That fewer do not. The search can end in a local optimum; other seeds, and `fitted` beside `held_out`, tell.
- Where the model reads. Of directions that hold copies of the value and are not read, Q may take the larger part.
- That the model keeps the value there. A swap can work through two directions, one that varies and does not reach the
  answer, and a dormant one, which runs by themselves hardly move and which does (Makelov et al. 2023,
  arXiv:2311.17030). A direction in which no two runs differ is not searched. One that runs move a little is searched
  and found; then `varying` falls to "nothing", where Q does not. One that they move more, of some percent of the mean
  square, passes `varying` too. The sign that is left is that Q does what the whole site, swapped, does not: where
  "whole" is below `held_out`, the value is not shown to be there, unless the rest of the site is known to hold what the
  swap must leave alone. Let the base's other inputs differ, too, so that little but the value leads to the target.

Source: Geiger et al. 2023 (arXiv:2303.02536). Differs: Q by a QR decomposition in the principal axes of x_donor - x;
the scales, without which a search fails where coordinates differ by orders of magnitude, since what is large is written
where little is meant; the site may be any address, the memories of several layers as one space too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import trange

from minimal_mamba import Add, Address, Edit, Mamba, MambaState, Project, Scale, Set
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.edits import Rows
from minimal_mamba.errors import EditError, InputError
from minimal_mamba.sites import RECURRENT_STATE

from .descent import Descent
from .metrics import log_prob
from .probe_rows import hold_out, read_groups, read_ints
from .run import Lengths
from .swaps import Pairs, Swapped, first_axis, most_varying, principal_axes, span_of
from .sweep.engine import rows_at_once


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Brief):
    """A subspace of a place, and what swapping it does.

    Args:
        place: where. basis: (k, *features) orthonormal float64, each direction in the shape that one row of the place
            records, layers and positions too if it has several; of one layer and position, as `Project` and
            `LinearProbe.basis` have it.
        scale: (*features) s, the size of donor - base in each coordinate; ones if it was not asked for.
        held_out: the score. fitted: the same on the pairs that it was fitted on.
        controls: name -> one `Swapped` a seed, or one alone; all but "forced" on the held-out pairs.
        spread: (k,) the mean square of donor - base / s along each direction, as a share of that of all.
        dims: dimensions that were searched. tested: (b,) bool, the pairs that were held out.
        losses: (epochs,) mean -log p(target) of the others while they were fitted, nats.
    """

    place: Address
    basis: Tensor
    scale: Tensor
    held_out: Swapped
    fitted: Swapped
    controls: Mapping[str, tuple[Swapped, ...]]
    spread: Tensor
    dims: int
    tested: Tensor
    losses: Tensor = field(repr=False)

    def swap(self, donor: Tensor, base: Tensor | None = None, *, rows: Rows = None) -> list[Edit]:
        """The edits that put the donor's part in the subspace in place of the base's, for `run`, `generate`, sweeps.

        Args:
            donor: what the place records in the donor's run. rows: of the batch; both then have that many rows.
            base: the same of the base's run without edits. The edit is then one `Set` of the whole place, as in the
                search. If None, a `Project` and an `Add`, between two `Scale` where scales were asked for, to be given
                in this order, which keep what is there at the time outside the subspace: for a place of one layer and
                position.
        Raises:
            EditError: no base, for a place of several layers or positions, or of `recurrent_state`, which no `Project`
                sees as one. InputError: values of another shape.
        """
        axis, shape = int(self.place.layer_axis), self.basis.shape[1:]
        for what, values in (("donor", donor), ("base", donor if base is None else base)):
            if not isinstance(values, Tensor) or first_axis(values, axis).shape[1:] != shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(f"{what} is {got}: give what {self.place} records, {tuple(shape)} a row.")
        q, s = self.basis.flatten(1).to(donor.device), self.scale.flatten().to(donor.device)
        new = first_axis(donor, axis).flatten(1).double() / s
        if base is None:
            if axis or not isinstance(self.place.pos, int) or self.place.site == RECURRENT_STATE.name:
                raise EditError(
                    f"{self.place}: several layers, positions or sites are one space here, which no edit sees at once. "
                    "Give base, the place's values in the run without edits."
                )
            part = (new @ q.T @ q).to(donor.dtype).unflatten(1, shape)
            swap: list[Edit] = [Project(self.place, self.basis, rows=rows), Add(self.place, part, rows=rows)]
            if bool((s == 1).all()):
                return swap
            return [Scale(self.place, 1 / self.scale, rows=rows), *swap, Scale(self.place, self.scale, rows=rows)]
        here = first_axis(base, axis).flatten(1).double()
        made = (here + s * ((new - here / s) @ q.T @ q)).to(donor.dtype).unflatten(1, shape)
        return [Set(self.place, made.movedim(0, axis), rows=rows)]


@torch.inference_mode(mode=False)
@torch.enable_grad()
def align(
    model: Mamba, ids: Tensor, donor_ids: Tensor, targets: Tensor | Sequence[int], place: Address, k: int, *,
    lengths: Lengths = None, state: MambaState | None = None, groups: Any = None, held_out: float = 0.3,
    dims: int | None = None, scale: bool = False, epochs: int = 100, batch: int = 64, learning_rate: float = 0.1,
    seeds: int = 1, seed: int = 0, backend: str = "auto", progress: bool = True,
) -> Alignment:  # fmt: skip
    """Find the k dimensions of a place which, swapped for the donor's, bring the target about.

    Args:
        ids, donor_ids: (b, l) pairs of prompts. targets: (b,) the token that each base should end in, were its hidden
            value the donor's. Of unrelated prompts, rather than such as differ in one word, little else leads there.
        place: any address; several layers and positions are one space, whose values in the base's run without edits
            are kept outside the subspace.
        lengths, state: as in `run`, of both prompts of a pair.
        groups: (b,) what pairs share; a group is not on both sides. None: pairs of the same tokens.
        held_out: the share of the groups that the score is taken of.
        dims: search the first principal components of x_donor - x alone, each coordinate in units of its own; None: all
            that the fitted pairs have. Few of them need fewer pairs.
        scale: swap each coordinate in units of its own, the root mean square of x_donor - x over the fitted pairs; for
            coordinates that differ in size by orders of magnitude.
        epochs: at most; the search ends when the loss has stopped to fall at three learning rates, each a third of the
            one before. batch: pairs of a step. learning_rate: of Adam, on coordinates of size 1.
        seeds: of the controls "random" and "shuffled"; 0 leaves them out. seed: of all that is drawn.
    Returns:
        Alignment.
    Raises:
        EditError, InputError: no address, prompts or targets that do not fit, more dimensions than vary.
    Cost: an epoch is a forward and a backward of the fitted pairs, from the place's first position on, and of the
        backward from its first layer on; as much again for each seed of "shuffled". Holds the values of the place in
        all pairs three times in float64, and the axes, (features, dimensions searched).
    """
    pairs = Pairs(model, ids, donor_ids, targets, place, lengths, state, rows_at_once(batch, 64, 1), backend)
    k, epochs, seeds, seed = read_ints(k=k, epochs=epochs, seeds=seeds, seed=seed)
    dims = None if dims is None else read_ints(dims=dims)[0]
    if not 0 < held_out < 1 or epochs < 1 or seeds < 0 or not learning_rate > 0 or (dims is not None and dims < 1):
        raise InputError(
            f"held_out={held_out}, epochs={epochs}, seeds={seeds}, learning_rate={learning_rate}, dims={dims}: a share "
            "between 0 and 1; 1 or more; 0 or more; above 0; 1 or more, or None."
        )
    rng = torch.Generator().manual_seed(seed)
    tested = hold_out(read_groups(pairs.tokens if groups is None else groups, len(pairs.tokens)), held_out, rng)
    train, test = (~tested).nonzero()[:, 0], tested.nonzero()[:, 0]
    d = pairs.donor - pairs.base  # (b, f)
    sizes = d[train].square().mean(0).sqrt()
    s = sizes.where(sizes > pairs.noise, 1.0) if scale else torch.ones_like(sizes)
    d = d / s
    axes = principal_axes(d[train], pairs.noise / s, dims)  # (f, m)
    m = axes.shape[1]
    if not 1 <= k <= m:
        raise InputError(
            f"k={k}: from 1 to {m}, the dimensions in which base and donor of the {len(train)} pairs that are fitted "
            f"differ{'' if dims is None else f', of which dims={dims} are searched'}."
        )
    near, turned = (x.to(wide(pairs.dtype)) for x in (d @ axes, s[:, None] * axes))
    varying = axes @ most_varying(d[train] @ axes)  # (f, m or fewer)

    def search(wanted: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Q (k, f), and the loss of each epoch."""
        free = torch.randn(m, k, generator=rng, dtype=torch.float64).to(near).requires_grad_()
        descent, losses = Descent([free], learning_rate), list[float]()
        bar = trange(epochs, desc=what, disable=not progress)
        for _ in bar:
            total = 0.0
            for rows in train[torch.randperm(len(train), generator=rng)].split(pairs.batch):
                q = torch.linalg.qr(free)[0]
                found = pairs.run(rows, pairs.base[rows].to(near) + near[rows] @ q @ (turned @ q).T)
                loss = -log_prob(found, wanted[rows]).sum()
                (gradient,) = torch.autograd.grad(loss, [free])
                descent.step([gradient / len(rows)])
                total += loss.item()
            losses.append(total / len(train))
            bar.set_postfix(nats=f"{losses[-1]:.3f}")
            if descent.ended(losses[-1]):
                break
        bar.close()
        return (axes @ torch.linalg.qr(free.detach().double())[0]).T, torch.tensor(losses, dtype=torch.float64)

    def score(q: Tensor, rows: Tensor = test, wanted: Tensor = pairs.targets) -> Swapped:
        return pairs.score(rows, pairs.base[rows] + s * (d[rows] @ q.T @ q), wanted)

    q, losses = search(pairs.targets, f"align {place}")
    controls = {
        "nothing": (pairs.score(test, pairs.base[test], pairs.targets),),
        "whole": (pairs.score(test, pairs.donor[test], pairs.targets),),
        "searched": (score(axes.T),),
        "varying": (score(span_of(varying @ (varying.T @ q.T)).T),),
    }
    for _ in range(seeds):
        some = torch.linalg.qr(torch.randn(m, k, generator=rng, dtype=torch.float64).to(d))[0]
        wrong = pairs.targets[torch.randperm(len(d), generator=rng)]
        nothing, _ = search(wrong, "align shuffled targets")
        for name, found in (("random", score((axes @ some).T)), ("shuffled", score(nothing, test, wrong)),
                            ("forced", score(nothing, train, wrong))):  # fmt: skip
            controls[name] = (*controls.get(name, ()), found)
    spread = (d @ q.T).square().sum(0) / d.square().sum()
    basis = q.unflatten(1, pairs.shape)
    return Alignment(
        place, basis, s.unflatten(0, pairs.shape), score(q), score(q, train), controls, spread, m, tested, losses
    )
