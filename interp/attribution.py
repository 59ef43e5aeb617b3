"""Attribution patching: what every cell of a patch sweep would do, to first order, from one forward and one backward.

effect(layer, pos) ~ sum over features of (donor - base) dMetric/dSite at the base

Sites of the scan are never held for all positions on the fast backends: the backward has dL/dh and the base's states
block by block, remakes the donor's states of the block beside them, and keeps their product's sum.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels_bridge import resolve
from minimal_mamba import Address, Edit, Mamba, MambaState, Set, at
from minimal_mamba.address import address_of, named_site
from minimal_mamba.block import wide
from minimal_mamba.errors import AddressError, EditError, InputError
from minimal_mamba.sites import ADDRESSABLE, RECURRENT_STATE
from minimal_mamba.tap import ScanInputs, Toward

from .positions import from_start
from .run import Lengths, Metric, Run, apply_metric, differentiate, donor_of, each, known, run
from .sweep import Grid
from .sweep.parts import groups
from .sweep.patch import chosen_layers, chosen_positions

SCAN = ("decay", "state_write", "ssm_state", "state_read")


def attribution_grid(
    model: Mamba,
    ids: Tensor,
    donor_ids: Tensor,
    *,
    site: str,
    metric: Metric,
    layers: int | slice | Sequence[int] | None = None,
    positions: int | slice | Sequence[int] | None = None,
    keep: str | None = None,
    steps: int = 0,
    path: str = "embed",
    edits: Edit | Iterable[Edit] = (),
    state: MambaState | None = None,
    donor_state: MambaState | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
    progress: bool = True,
) -> Grid:
    """Estimate `patch_grid` from gradients: every layer and position at once.

        effect(layer, pos) = sum over features of (donor - base) G        G = dMetric/dSite, as `gradients` gives it

    With steps=0, G is taken at the base run: attribution patching. It equals exact patching where the metric is affine
    in the site, as it is in `ssm_state`, `y` or `mixer_out` for a metric linear in the same layer's `mixer_out`;
    elsewhere it is an estimate, to be held against `patch_grid` where it matters. With steps > 0, G is a mean along a
    straight line, at that many nodes of Gauss and Legendre:

    - path="embed": the line runs from the base's embeddings to the donor's, and G is the mean over the runs on it. For
      site="embed" these are integrated gradients, complete: over the positions they sum to metric(donor) -
      metric(base), up to quadrature (with `edits`, to the metric of the donor's embeddings under these edits minus the
      base's). For other sites (EAP-IG) G is smoothed and no such identity holds.
    - path="cell": the line runs from the base's value of one cell to the donor's, nothing else is patched. The parts of
      a cell sum to its exact effect, up to quadrature. It pays only with `keep`: without, `patch_grid` gives the same
      numbers, exact, from one forward a cell.

    Effects of several cells do not add up to that of patching them together: what flows through many counts in each.

    Args:
        ids, donor_ids: (b, l) base and donor prompts, row by row.
        site: any site, or "recurrent_state".
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        layers, positions: the grid's rows and columns, as in `patch_grid`, but one layer a row.
        keep: a feature axis of the site that is not summed over, as "e" or "n".
        steps: nodes along the path. path: "embed" or "cell".
        edits: of the base's runs; the donor's has none, and its values are those that `Set` would put there.
        state, donor_state: memories to go on from; the donor goes on from `state` if it has none of its own. Positions
            count on from where it stood, the same for all rows.
        lengths: (b,) tokens in each row, the same in base and donor.
    Returns:
        Grid; `values` (layers, positions, b) is the base's metric plus the effect, so `effect()` is the attribution.
        With `keep` its `parts` are along that axis, (layers, positions, parts, b), and their effects sum to the cell's.
    Raises:
        What `gradients` raises, also for a metric without a gradient; InputError for layers patched together.
    Cost: a forward of the donor, and a forward and a backward of the base, or one of each for every step; two forwards,
        and as many of both, for every cell with path="cell". One forward of the base more for sites outside the scan.
        Memory beyond a backward's: the site and its gradient; for sites of the scan the donor's u, dt and B of every
        layer, and a few blocks, but on "reference" all of (b, l, e, n).
    Source: Nanda 2023, "Attribution patching"; Sundararajan et al. 2017 (arXiv:1703.01365); Hanna et al. 2024
        (arXiv:2403.17806, "EAP-IG inputs"). Differs: per example; cells and not edges.
    """
    known(model)
    named_site(site)
    if path not in ("embed", "cell"):
        raise InputError(f"path={path!r}: 'embed' or 'cell'.")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise InputError(f"steps={steps!r}: an int, 0 (the gradient at the base) or more.")
    kept = [axis for axis in ADDRESSABLE[site].features if axis != "n+k"]
    if keep is not None and keep not in kept:
        axes = ", ".join(kept)
        raise InputError(f"keep={keep!r}: {site} has the feature axes {axes}; keep one of them, or None.")
    ids, sizes = model.check(ids, lengths, state)
    donor_ids = donor_of(model, ids, donor_ids, donor_state)
    ids, donor_ids = (given[:, : int(sizes.max())] for given in (ids, donor_ids))  # the rest is padding in every row
    rows = chosen_layers(layers, site, model.config.n_layer)
    if any(len(row) > 1 for row in rows):
        raise InputError(f"layers={layers!r}: an attribution is of one layer; patch_grid patches several together.")
    changes = each(edits, Edit)
    twice = [e for e in changes if isinstance(e, Edit) and e.address.site == "embed"]
    if twice and steps and path == "embed":
        raise EditError(
            f"{twice[0]} with steps={steps} and path='embed': the embeddings are those of the line from base to donor. "
            "Edit resid_pre of layer 0, which is the same stream behind it, or take steps=0."
        )
    pair = _Pair(model, ids, donor_ids, metric, changes, state, donor_state or state, lengths, backend)
    start = pair.start
    columns = chosen_positions(positions, sizes + start)
    if positions is None or isinstance(positions, slice):
        columns = [p for p in columns if p >= start]
    if not columns or any(0 <= p < start for p in columns):
        raise AddressError(f"positions={positions!r}: these runs have their positions from {start} on.")
    wanted = [row[0] if row else 0 for row in rows]
    passes = max(steps, 1) if path == "embed" or not steps else steps * len(wanted) * len(columns)
    bar = tqdm(total=passes, desc=f"attribution {site}", disable=not progress)
    with torch.inference_mode(False), torch.no_grad(), bar:
        if path == "cell" and steps:
            effect, base, donor = pair.cells(site, wanted, columns, keep, steps, bar.update)
        else:
            whole, base, donor = pair.everywhere(site, wanted, keep, steps, bar.update)  # (layers, l, [keep,] b)
            local = torch.stack([from_start(p, sizes + start) - start for p in columns])
            index = local.to(whole.device).reshape(1, len(columns), *[1] * (whole.dim() - 3), len(ids))
            effect = whole.gather(1, index.expand(len(wanted), -1, *whole.shape[2:]))
    parts = tuple(groups(model, keep)) if keep else None
    return Grid(base + effect, base, donor, site, tuple(wanted), tuple(columns), parts)


class _Pair:
    """A base and a donor, and what is asked of them."""

    def __init__(
        self, model: Mamba, ids: Tensor, donor_ids: Tensor, metric: Metric, edits: Sequence[Edit],
        state: MambaState | None, donor_state: MambaState | None, lengths: Lengths, backend: str,
    ):  # fmt: skip
        self.model, self.ids, self.donor_ids, self.metric, self.edits = model, ids, donor_ids, metric, edits
        self.state, self.donor_state, self.lengths, self.backend = state, donor_state, lengths, backend
        self.streams = resolve(backend, model.device).name != "reference"
        places = torch.cat([(s or model.initial_state(len(ids))).position for s in (state, donor_state)])
        if bool((places != places[0]).any()):
            raise InputError(f"the states stand at positions {places.tolist()}: a grid's column is one position.")
        self.start = int(places[0])
        sizes = model.check(ids, lengths)[1]
        self.tokens = (torch.arange(ids.shape[1]) < sizes[:, None]).to(model.device)  # (b, l)

    def base(self, record: Sequence[Address]) -> Run:
        return self._run(self.ids, self.edits, record, self.state)

    def donor(self, record: Sequence[Address]) -> Run:
        return self._run(self.donor_ids, (), record, self.donor_state)

    def _run(self, ids: Tensor, edits: Sequence[Edit], record: Sequence[Address], state: MambaState | None) -> Run:
        last_only = self.lengths is not None
        return run(self.model, ids, edits, record, self.backend, state, lengths=self.lengths, last_only=last_only)

    def everywhere(
        self, site: str, layers: list[int], keep: str | None, steps: int, done: Callable[[], object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The effects at all positions (layers, l, [keep,] b), and the two runs' metrics."""
        parts = ("ssm_state", "conv_state") if site == RECURRENT_STATE.name else (site,)
        streamed = [p for p in parts if p in SCAN and self.streams]
        plain = [_where(p, layers) for p in parts if p not in streamed]
        inputs = [_where(p, layers) for p in ("u", "dt", "B")] if streamed else []
        embed = [at.embed()] if steps else []
        if streamed and steps and any(e.address.site in (*SCAN, RECURRENT_STATE.name) for e in self.edits):
            raise EditError(
                f"{site} with steps={steps} and edits inside the scan: the base's states cannot be remade from its "
                "scan's inputs. Use backend='reference', or steps=0."
            )
        donor = self.donor([*plain, *inputs, *embed])
        base = self.base([*plain, *(inputs if steps else ()), *embed]) if plain or steps else None
        differences = [self._real(donor, a) - self._real(base, a) for a in plain]
        runs = [self._scan_inputs(donor, inputs, layers, self.donor_state)]
        if steps:
            runs.append(self._scan_inputs(base, inputs, layers, self.state))
        total: Tensor | None = None
        for node, weight in _nodes(steps):
            line = [Set(a, torch.lerp(self._real(base, a), self._real(donor, a), node)) for a in embed]
            moves = {
                layer: Toward(part, self._size(keep), tuple(of[i] for of in runs))
                for part in streamed
                for i, layer in enumerate(layers)
            }
            found, sizes, _ = differentiate(
                self.model, self.ids, self.metric, plain, [*line, *self.edits], self.backend, self.state, self.lengths,
                moves,
            )  # fmt: skip
            gains = [_sum(found[a] * d, a, keep) for a, d in zip(plain, differences, strict=True)]
            if moves:
                gains.append(
                    torch.stack([s.squeeze(-1 if keep == "e" else -2) if keep else s[..., 0, 0] for s in sizes])
                )
            now = weight * torch.stack(gains).sum(0)  # (layers, b, l, [keep])
            total = now if total is None else total + now
            done()
        assert total is not None
        effect = total.movedim(1, -1)  # (layers, l, [keep,] b)
        at_base = found.values if base is None else apply_metric(self.metric, base.logits)
        return effect, at_base, apply_metric(self.metric, donor.logits)

    def cells(
        self, site: str, layers: list[int], columns: list[int], keep: str | None, steps: int, done: Callable[[], object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integrated gradients of each cell by itself, (layers, positions, [keep,] b), and the two runs' metrics."""
        rows = []
        for layer in layers:
            for pos in columns:
                cell = address_of(site, layer if ADDRESSABLE[site].layered else None, pos=pos)
                donor, base = self.donor([cell]), self.base([cell])
                total = torch.zeros_like(donor[cell])
                for node, weight in _nodes(steps):
                    edits = [*self.edits, Set(cell, torch.lerp(base[cell], donor[cell], node))]
                    found, *_ = differentiate(
                        self.model, self.ids, self.metric, [cell], edits, self.backend, self.state, self.lengths
                    )
                    total += weight * found[cell]
                    done()
                gain = (total * (donor[cell] - base[cell]))[None, :, None]  # (1, b, 1, *features)
                rows.append(_sum(gain, cell, keep)[0, :, 0].movedim(0, -1))
        effect = torch.stack(rows).unflatten(0, (len(layers), len(columns)))
        return effect, apply_metric(self.metric, base.logits), apply_metric(self.metric, donor.logits)

    def _size(self, keep: str | None) -> Tensor:
        c, (b, l) = self.model.config, self.ids.shape
        e, n = (c.d_inner if keep == "e" else 1), (c.d_state if keep == "n" else 1)
        return torch.zeros(b, l, e, n, dtype=wide(self.model.dtype), device=self.ids.device, requires_grad=True)

    def _real(self, one: Run | None, address: Address) -> Tensor:
        """What was recorded, with zeros at positions that a row does not have: no gradient reaches them."""
        assert one is not None
        tokens = self.tokens.reshape(*self.tokens.shape, *[1] * len(address.spec.features))
        return torch.where(tokens, one.records[address], 0.0)

    def _scan_inputs(
        self, one: Run | None, inputs: list[Address], layers: list[int], state: MambaState | None
    ) -> list[ScanInputs]:
        """Of each layer, what the run's states are remade from; nothing where no inputs were recorded."""
        if not inputs:
            return []
        u, dt, B = (self._real(one, a) for a in inputs)
        h = (state or self.model.initial_state(len(self.ids))).ssm_state
        return [ScanInputs(u[i], dt[i], B[i], h[layer].detach()) for i, layer in enumerate(layers)]


def _where(site: str, layers: list[int]) -> Address:
    """All positions of a site, with an axis for layers where it has one."""
    return address_of(site, layers if ADDRESSABLE[site].layered else None)


def _sum(products: Tensor, address: Address, keep: str | None) -> Tensor:
    """Sum over the features but `keep`: (layers, b, l, [keep])."""
    features = address.spec.features
    products = products if products.dim() == 3 + len(features) else products[None]
    gone = [3 + i for i, axis in enumerate(features) if axis != keep]
    return products.sum(gone) if gone else products


def _nodes(steps: int) -> list[tuple[float, float]]:
    """Where along the line 0..1 gradients are taken, and their weights; no steps: the base."""
    if not steps:
        return [(0.0, 1.0)]
    x, w = np.polynomial.legendre.leggauss(steps)
    return [(float(a), float(b)) for a, b in zip((x + 1) / 2, w / 2, strict=True)]
