"""A plan as one layer sees it: what an operation asks to know what is touched, and what it hands over."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .edits import Apply
from .item import Item
from .sites import SITES
from .tap import Tap, Toward

if TYPE_CHECKING:
    from .plan import Plan

ADDED = ("ssm_state", "state_write")  # the sites whose probes a scan can take as something added to the state


class LayerTap(Tap):
    """A plan seen from one layer."""

    def __init__(self, plan: "Plan", layer: int):
        self.plan, self.layer = plan, layer

    def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
        return self.plan.pass_by(site, self.layer, value, t)

    def _times(self, sites: Sequence[str], kind: Callable[[Item], bool]) -> list[int]:
        found: set[int] = set()
        for site in sites:
            for item in filter(kind, self.plan.items.get((site, self.layer), [])):
                found.update(item.by_time)
        return sorted(found)

    def edited(self, *sites: str) -> list[int]:
        probed = self._times([s for s in sites if s not in ADDED], lambda item: item.is_probe)
        return sorted({*self._times(sites, lambda item: item.is_edit), *probed})

    def only_probed(self, *sites: str) -> list[int]:
        probed = self._times(sites, lambda item: item.is_probe)
        return sorted({*probed} - {*self._times(sites, lambda item: item.is_edit)})

    def overwritten(self) -> list[int]:
        asked: dict[int, set[int]] = {}  # position -> the rows in which what was there still counts
        looked_at: set[int] = set()  # by a function, which the edits after it do not undo
        for item in self.plan.items.get(("ssm_state", self.layer), []):
            if item.edit is None:
                continue
            for t, (i, _) in item.by_time.items():
                left = asked.setdefault(t, {*range(len(self.plan.start))})
                rows, changed = item.rows[i], item.rows[i][item.write[i]].tolist()
                if isinstance(item.edit, Apply) and left.intersection(rows.tolist()):
                    looked_at.add(t)
                if item.edit.over_batch and left.intersection(rows.tolist()):
                    left.update(changed)
                elif item.edit.blind and item.index is None:
                    left.difference_update(changed)
        found = {t for t, left in asked.items() if not left} - looked_at
        return sorted(found - set(self._times(("decay", "state_write"), lambda item: item.edit is not None)))

    def touches(self, *sites: str) -> bool:
        move = self.plan.moves.get(self.layer)
        items = (item for site in sites for item in self.plan.items.get((site, self.layer), ()))
        return any(item.live for item in items) or (move is not None and move.site in sites)

    def recorded(self, *sites: str) -> list[int]:
        return self._times(sites, lambda item: item.edit is None)

    def record(self, site: str, values: Tensor, times: Sequence[int]) -> None:
        self.plan.record_many(site, self.layer, values, times)

    def room(self, site: str, times: Sequence[int], like: Tensor) -> Tensor | None:
        return self.plan.place(site, self.layer, times, like)

    def toward(self) -> Toward | None:
        self.plan.moved.add(self.layer)
        return self.plan.moves.get(self.layer)

    def probed(self, times: Sequence[int], *sites: str) -> tuple[list[int], Tensor] | None:
        items = [
            item for site in sites or ADDED for item in self.plan.items.get((site, self.layer), []) if item.is_probe
        ]
        taken = sorted({t for t in times for item in items if t in item.by_time})
        if not taken:
            return None
        sizes = [self.plan.config.size(axis) for axis in SITES[items[0].site].features]
        total: Tensor | None = None
        for item in items:
            places = [
                (*item.by_time[t], torch.full_like(item.by_time[t][0], p))
                for p, t in enumerate(taken)
                if t in item.by_time
            ]
            if not places:
                continue
            i, j, p = (torch.cat(parts) for parts in zip(*places, strict=True))
            share = item.share(self.layer)  # gathered at once: one position at a time costs the square in the backward
            assert share is not None
            spread = (-1,) + (1,) * len(item.index or ())
            chosen = item.features(1) if item.index else ()
            at = tuple(a.to(share.device) for a in (item.rows[i].reshape(spread), p.reshape(spread), *chosen))
            added = share.new_zeros(len(self.plan.start), len(taken), *sizes).index_put(
                at, share[i.to(share.device), j.to(share.device)]
            )
            item.done += len(i)
            total = added if total is None else total + added
        assert total is not None
        return taken, total
