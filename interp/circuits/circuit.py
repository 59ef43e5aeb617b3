"""A circuit: the edges that are kept of the graph, how it is found, and how much of the metric it carries."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minimal_mamba import Address, Mamba
from minimal_mamba.brief import Brief
from minimal_mamba.errors import CheckpointError, InputError, MambascopeError, of_type
from minimal_mamba.files import write_json
from minimal_mamba.provenance import provenance

from ..run import Lengths, Metric, apply_metric
from ..sweep.engine import rows_at_once
from ..sweep.grid import standard_error, vanishes
from .graph import Edge, node, order
from .graph import edges as all_edges
from .paths import EdgeEffects, check, patched
from .views import Values, send

VERSION = 1


@dataclass(frozen=True)
class Circuit:
    """The edges kept, in the order of the forward, and the effect of each in the metric's unit.

    Args:
        edges: no edge twice. sizes: the mean size of each one's effect over the rows, `EdgeEffects.size`. towards: the
            mean of the effects towards the donor, `EdgeEffects.towards`; near 0 where rows go either way.
    """

    edges: tuple[Edge, ...]
    sizes: tuple[float, ...]
    towards: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(set(self.edges)) == len(self.edges) == len(self.sizes) == len(self.towards):
            raise InputError(f"a circuit has each edge once, with its size and mean; got {len(self.edges)} edges.")
        ranked = sorted(range(len(self.edges)), key=lambda i: order(self.edges[i]))
        object.__setattr__(self, "edges", tuple(self.edges[i] for i in ranked))
        for name in ("sizes", "towards"):
            object.__setattr__(self, name, tuple(float(getattr(self, name)[i]) for i in ranked))

    @property
    def nodes(self) -> tuple[Address, ...]:
        """Every sender and receiver, once."""
        return tuple(dict.fromkeys(n for e in self.edges for n in (e.sender, e.receiver)))

    def __len__(self) -> int:
        return len(self.edges)

    def __str__(self) -> str:
        rows = zip(self.edges, self.sizes, self.towards, strict=True)
        lines = [f"  {size:.3g} ({towards:+.3g})  {edge}" for edge, size, towards in rows]
        head = f"Circuit of {len(self.edges)} edges between {len(self.nodes)} nodes; size (towards donor)"
        return "\n".join([head, *lines])

    __repr__ = __str__

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        rows = [
            {"sender": _out(edge.sender), "receiver": _out(edge.receiver), "size": size, "towards": towards}
            for edge, size, towards in zip(self.edges, self.sizes, self.towards, strict=True)
        ]
        write_json(Path(path), {"version": VERSION, "edges": rows, "provenance": provenance()})

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            CheckpointError: a file that is missing, or is no circuit of this version.
        """
        try:
            raw = json.loads(Path(path).read_text())
            if raw["version"] != VERSION:
                raise ValueError(f"version {raw['version']!r}, where this mambascope reads {VERSION}")
            rows = raw["edges"]
            found = tuple(Edge(node(*row["sender"]), node(*row["receiver"])) for row in rows)
            return cls(found, tuple(row["size"] for row in rows), tuple(row["towards"] for row in rows))
        except (OSError, ValueError, LookupError, TypeError, MambascopeError) as error:
            raise CheckpointError(f"{path} holds no circuit: {error!r}. Circuit.save writes one.") from None


def _out(address: Address) -> list[Any]:
    return [address.site, address.layer, address.pos]


def prune(*effects: EdgeEffects, keep: int | None = None, threshold: float | None = None) -> Circuit:
    """Keep the edges with the largest effects, then drop what no longer lies on a way from an embedding to logits.

    An edge counts by its mean size over the batch, `EdgeEffects.size`; one of no effect at all is never kept. What is
    dropped at the end changes nothing: its message is the other run's in any case, or nobody reads its receiver.

    Where two factors of a product change together (B and u of a write, the state and C of a read) and are both zero in
    the base, neither edge does anything alone, and the way breaks there. In the other direction, with base and donor
    exchanged, each does: give the effects of both, and an edge counts by the larger.

    Args:
        effects: of single edges; several of the same edges count by the largest size, such as those of both directions.
            Edges that it does not name count as kept; they are not part of the circuit.
        keep: how many edges, before the last step. threshold: or the least size, in the metric's unit; the circuit may
            then be empty.
    Raises:
        InputError: neither or both of keep and threshold; effects of several edges at once, or of different ones; a
            number of edges, other than 0, of which none lies on such a way, with the least number of which some do.
    """
    if (keep is None) == (threshold is None):
        raise InputError("give either keep=, a number of edges, or threshold=, a size in the metric's unit.")
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise InputError(f"keep={keep!r}: an int of at least 0.")
    for i, one in enumerate(effects):
        of_type(f"effects[{i}]", one, EdgeEffects, "that edge_attribution or path_patch gave")
    if not effects or any(e.edges != effects[0].edges or e.length != effects[0].length for e in effects):
        raise InputError("give the effects of at least one method, and where there are several, of the same edges.")
    single = [e for e in effects[0].edges if isinstance(e, Edge)]
    if len(single) != len(effects[0].edges) or len(set(single)) != len(single):
        raise InputError("a circuit is pruned from effects of single edges, each once; these hold tuples or repeats.")
    size, by = torch.stack([e.size() for e in effects]).max(0)
    towards = torch.stack([e.towards() for e in effects]).gather(0, by[None])[0]
    if not size.isfinite().all():
        raise InputError(
            f"{int((~size.isfinite()).sum())} of {len(single)} effects are NaN or infinite, such as that of "
            f"{single[int((~size.isfinite()).nonzero()[0])]}: look for where the model's numbers overflow."
        )
    ranked = [i for i in size.argsort(descending=True, stable=True).tolist() if size[i] > 0]
    chosen = ranked[:keep] if threshold is None else [i for i in ranked if size[i] >= threshold]
    rest = set(all_edges(effects[0].config, effects[0].length)) - set(single)

    def connected(some: Sequence[int]) -> list[int]:
        on_the_way = _connected({*(single[i] for i in some), *rest})
        return [i for i in some if single[i] in on_the_way]

    last = connected(chosen)
    if keep and not last:
        if connected(ranked):
            enough = bisect_left(range(len(ranked)), True, key=lambda n: bool(connected(ranked[:n])))
            told = f"give keep={enough} or more, which leaves some, or keep=0 for a circuit of none."
        else:
            told = (
                f"nor does any of all {len(ranked)} that have an effect. Give the effects of the other direction too, "
                "with base and donor exchanged, if these are two prompts that the metric tells apart."
            )
        raise InputError(
            f"keep={keep}: of the {len(chosen)} edges of the largest effects none lies on a way from an embedding to "
            f"logits, so that no edge would be left; {told}"
        )
    return Circuit(tuple(single[i] for i in last), tuple(size[last].tolist()), tuple(towards[last].tolist()))


def _connected(live: set[Edge]) -> set[Edge]:
    """Those edges that lie on a way from an embedding to logits."""
    ranked = sorted(live, key=order)  # a sender is always computed before its receiver
    fed = {e.sender for e in live if e.sender.site == "embed"}
    fed_edges = []
    for edge in ranked:
        if edge.sender in fed:
            fed.add(edge.receiver)
            fed_edges.append(edge)
    read = {e.receiver for e in live if e.receiver.site == "logits"}
    found = set()
    for edge in reversed(fed_edges):
        if edge.receiver in read:
            read.add(edge.sender)
            found.add(edge)
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Brief):
    """How much of the metric circuits carry.

    Args:
        values: (circuits, b) the metric of each circuit's run. base: (b,) of the whole model. corrupt: (b,) with no
            edge kept. sizes: how many edges each circuit has.
    """

    values: Tensor
    base: Tensor
    corrupt: Tensor
    sizes: tuple[int, ...]

    def score(self) -> Tensor:
        """(circuits,): mean(values - corrupt) / mean(base - corrupt); 1 is the whole model, 0 is none of it.

        The ratio of means, not the mean of ratios; rows in which the metric should fall count with the other sign.
        """
        sign = (self.base - self.corrupt).sign()
        return ((self.values - self.corrupt) * sign).mean(-1) / self._gap()

    def error(self) -> Tensor:
        """(circuits,): one standard error of `score`, over the rows of the batch (delta method)."""
        gap = self.base - self.corrupt
        residual = (self.values - self.corrupt - self.score()[:, None] * gap) * gap.sign()
        return standard_error(residual) / self._gap()

    def missed(self) -> Tensor:
        """(circuits,): mean |values - base| / mean |corrupt - base|; 0 where every row has the whole model's metric.

        In `score` what one row has too much may make up for what another lacks; here it cannot.
        """
        return (self.values - self.base).abs().mean(-1) / self._gap()

    def _gap(self) -> Tensor:
        gap = (self.base - self.corrupt).abs().mean()
        if vanishes(gap, self.base, self.corrupt):
            raise InputError("without any edge the metric is the base's: there is nothing for a circuit to carry.")
        return gap


@torch.no_grad()
def faithfulness(
    model: Mamba,
    circuits: Circuit | Sequence[Circuit],
    ids: Tensor,
    donor_ids: Tensor,
    metric: Metric,
    *,
    ablate: str = "donor",
    graph: Iterable[Edge] | None = None,
    lengths: Lengths = None,
    backend: str = "auto",
    batch: int | None = None,
    progress: bool = True,
) -> Faithfulness:
    """Run circuits: every edge outside carries what the donor run sends there, every edge inside this run's own value.

    It is exact on the level of edges: a node computes from a kept edge's live value and an other edge's donor value at
    once. The live value is that of the circuit's run, so what enters only through edges outside is lost further on.

    Args:
        circuits: one, or several, as for a curve over their sizes: [prune(effects, keep=n) for n in (50, 100, 200)].
        ids, donor_ids: (b, l) base and donor (corrupt) prompts, row by row.
        metric: logits (b, l, v) -> (b,); with `lengths` it is given each row's last token, (b, 1, v).
        ablate: "donor": edges outside carry the donor's value, row by row; "mean": its mean over the donor's rows.
        graph: the edges that a circuit is a choice of, such as `effects.edges`; what is not among them is live. All of
            the model's if None.
        lengths: (b,) tokens in each row, the same in base and donor.
        batch: rows at a time; None: 320, or of long prompts as many as hold 8,192 tokens.
    Returns:
        Faithfulness; `.score()` is 1 for a circuit of all edges and 0 for one of none.
    Cost: max(5, k) rows of a forward for each circuit and row, with a readable step of the scan at every position; the
        donor's decay, write and state are kept at all positions of the graph.
    Source: Wang et al. 2022 (arXiv:2211.00593), section 4; edges as in Conmy et al. 2023 (arXiv:2304.14997). Differs:
        normalised as in Hanna et al. 2024 (arXiv:2403.17806), with each row counted towards its own base.
    """
    if ablate not in ("donor", "mean"):
        raise InputError(f"ablate={ablate!r}: 'donor' or 'mean'.")
    several = list(circuits) if isinstance(circuits, Iterable) else [circuits]
    for i, circuit in enumerate(several):
        of_type(f"circuits[{i}]", circuit, Circuit, "that prune gave")
    ids, donor_ids, chosen = check(model, ids, donor_ids, lengths, graph)
    room = rows_at_once(batch, 320, ids.shape[1])
    chosen = list(dict.fromkeys(chosen))
    for circuit in several:
        if wrong := set(circuit.edges) - set(chosen):
            raise InputError(f"{sorted(wrong, key=order)[0]} of a circuit is no edge of the graph that it is run in.")
    values = Values(model, donor_ids, chosen, lengths, backend, mean=ablate == "mean")
    base = apply_metric(metric, send(model, ids, values, {}, {}, lengths, backend)[0])
    outside: list[list[Edge]] = [[e for e in chosen if e not in inside] for inside in (set(c.edges) for c in several)]
    jobs = max(1, room // (max(5, model.config.d_conv) * len(ids)))
    todo, found = [chosen, *outside], []
    with tqdm(total=len(todo), desc="circuits", disable=not progress) as bar:
        for first in range(0, len(todo), jobs):
            part = todo[first : first + jobs]
            found += patched(model, ids, values, part, metric, lengths, backend)
            bar.update(len(part))
    made = torch.stack(found[1:]) if several else base.new_zeros(0, len(base))
    return Faithfulness(made, base, found[0], tuple(map(len, several)))
