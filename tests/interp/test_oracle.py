"""Edits against an oracle without `Plan`: one row alone, absolute positions, loops and plain indexing."""

import itertools
import math
import random

import pytest
import torch
from helpers import tiny

from interp import Add, Apply, Mean, Project, Scale, Set, Zero, at, run
from minimal_mamba import Tap
from minimal_mamba.sites import ADDRESSABLE

MODEL, B, L = tiny(seed=2), 4, 8
CONFIG = MODEL.config
IDS = torch.randint(0, 29, (B, L), generator=torch.Generator().manual_seed(0))
PARTS = {"recurrent_state": [("ssm_state", slice(CONFIG.d_state)), ("conv_state", slice(CONFIG.d_state, None))]}
KINDS = {"Set": Set, "Add": Add, "Scale": Scale, "Mean": Mean, "Zero": Zero, "Project": Project, "Apply": Apply}
CASES = 60


class Row(Tap):
    """The edits of one row, (site, layer) -> [(position, what becomes of the cell)]; `seen` keeps every cell."""

    def __init__(self, cells, seen, layer=None):
        self.cells, self.seen, self.layer = cells, seen, layer

    def at_layer(self, layer):
        return Row(self.cells, self.seen, layer)

    def __call__(self, site, value, t=None):
        row = [value[0]] if t is not None else list(value[0])
        times = [t] if t is not None else range(len(row))
        for i, p in enumerate(times):
            for position, change in self.cells.get((site, self.layer), []):
                row[i] = change(row[i]) if position == p else row[i]
            self.seen[site, self.layer, p] = row[i]
        return row[0][None] if t is not None else torch.stack(row)[None]


def bent(x):
    return torch.tanh(x) + 0.3


def changing(kind, index, given):
    """cell -> cell: what an edit of this kind does at these channels."""

    def change(cell):
        cell, grid = cell.clone(), torch.meshgrid(*map(torch.tensor, index), indexing="ij")
        old = cell[grid]
        if kind.startswith("Project"):
            M = given.flatten(1)
            inside = (M.T @ torch.linalg.inv(M @ M.T) @ M @ old.flatten()).reshape(old.shape)
            cell[grid] = inside if kind == "Project keep" else old - inside
        else:
            cell[grid] = {"Add": lambda: old + given, "Scale": lambda: old * given, "Apply": lambda: bent(old)}.get(
                kind, lambda: given.expand_as(old)
            )()
        return cell

    return change


def everything(size):
    return slice(None), list(range(size))


def pick(r, size):
    """A selector of an axis, and the indices that it means."""
    some = r.sample(range(size), r.randint(1, min(3, size)))
    some = some[0] if r.random() < 0.3 else some
    start, step = r.randrange(size), r.choice([None, 1, 2])
    chosen = r.choice(
        [slice(None), slice(start, None, step), slice(start, r.randint(start + 1, size), step), some, some]
    )
    meant = list(range(size))[chosen] if isinstance(chosen, slice) else [some] if isinstance(some, int) else some
    if not isinstance(chosen, slice) and r.random() < 0.4:
        chosen = chosen - size if isinstance(chosen, int) else [i - size if r.random() < 0.5 else i for i in chosen]
    return chosen, meant


def pick_positions(r, shortest):
    """A selector of positions that each row has some of."""
    if r.random() < 0.4:
        stop = r.choice([None, -r.randint(1, shortest - 1)])
        return slice(-r.randint(1 - (stop or 0), L), stop, r.choice([None, None, 2]))
    chosen, meant = pick(r, shortest)
    if isinstance(chosen, slice):
        return chosen
    back = shortest if r.random() < 0.4 else 0
    return [p - back for p in meant] if isinstance(chosen, list) else meant[0] - back


def columns(pos, sizes):
    """For each row, the position in each column, None where it has none."""
    if not isinstance(pos, slice):
        return [[p % n if p < 0 else p for p in ([pos] if isinstance(pos, int) else pos)] for n in sizes]
    have = [list(range(n))[pos] for n in sizes]
    if pos.start is None or pos.start >= 0:
        return [ps + [None] * (max(map(len, have)) - len(ps)) for ps in have]
    offsets = sorted({p - n for ps, n in zip(have, sizes, strict=True) for p in ps})
    return [[n + o if n + o in ps else None for o in offsets] for ps, n in zip(have, sizes, strict=True)]


def draw_place(r, site, sizes):
    """An address, and what it means: layers, each row's columns, channels, and which axes an int drops."""
    layered, features = ADDRESSABLE[site].layered, [a for a in ADDRESSABLE[site].features if a != "n+k"]
    pos = pick_positions(r, min(sizes))
    layer, layers = pick(r, CONFIG.n_layer) if layered else (0, [None])
    picked = {
        axis: pick(r, CONFIG.size(axis)) if r.random() < 0.7 else everything(CONFIG.size(axis)) for axis in features
    }
    address = getattr(at, site)(
        pos=pos, **({"layer": layer} if layered else {}), **{a: s for a, (s, _) in picked.items()}
    )
    if site in PARTS:
        picked["n+k"] = everything(CONFIG.size("n+k"))
    dropped = [isinstance(s, int) for s in (layer, None, pos, *(s for s, _ in picked.values()))]
    return address, layers, pos, [meant for _, meant in picked.values()], dropped


def draw(seed):
    """Lengths, places, edits, their cells for each row, and what the case is made of."""
    r, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [r.randint(3, L) for _ in range(B)] if r.random() < 0.7 else [L] * B
    places, edits, cells, drawn = [], [], [{} for _ in range(B)], set()
    for turn in range(r.randint(2, 4)):
        site = r.choice(["ssm_state", "u"]) if turn > 1 else list(ADDRESSABLE)[(seed + 7 * turn) % len(ADDRESSABLE)]
        places.append(draw_place(r, site, sizes))
        address, layers, pos, index, dropped = places[-1]
        kinds = ["Set", "Add", "Scale", "Mean", "Zero"] + ["Apply"] * (site not in PARTS)
        kind = r.choice(kinds + ["Project", "Project keep"] * (site not in PARTS and not all(dropped[3:])))
        rows = r.sample(range(B), r.randint(1, B))
        at_columns = columns(pos, [sizes[row] for row in rows])
        full = [len(layers), len(rows), len(at_columns[0]), *map(len, index)]
        shape, tail = ([s for s, d in zip(full[k:], dropped[k:], strict=True) if not d] for k in (0, 3))
        form = r.choice(["full", "full", "ones", "tail", "number"])
        given = {"full": shape, "tail": tail, "number": [], "ones": [r.choice([1, s]) for s in shape]}[form]
        value = torch.rand(given, generator=rng, dtype=torch.float64) + 0.2
        basis = torch.randn([min(2, math.prod(tail)), *tail], generator=rng, dtype=torch.float64)
        arguments = {"Zero": [], "Apply": [bent], "Project": [basis], "Project keep": [basis]}.get(kind, [value])
        chosen = None if rows == list(range(B)) else [i - B if r.random() < 0.3 else i for i in rows]
        keep = {"keep": True} if kind == "Project keep" else {}
        edits.append(KINDS[kind.split()[0]](address, *arguments, rows=chosen, **keep))
        drawn |= {site, kind, form, *(["ragged"] if any(None in ps for ps in at_columns) else [])}
        value = value.reshape([1] * (len(shape) - len(tail)) + tail) if form == "tail" else value
        value = value.expand(shape).reshape(full)
        value = value * (kind != "Zero")
        for i, j, c in itertools.product(*map(range, full[:3])):
            for part, n in PARTS.get(site, [(site, None)]):
                own, channels = basis if "Project" in kind else value[i, j, c], index
                if n:
                    own, channels = own[:, n], [index[0], list(range(own[:, n].shape[1]))]
                change = (at_columns[j][c], changing(kind, channels, own))
                cells[rows[j]].setdefault((part, layers[i]), []).append(change)
    return sizes, places, edits, cells, drawn


def recorded(place, sizes, seen):
    """What recording there should give, cell by cell, NaN where a row has no such position."""
    address, layers, pos, index, dropped = place
    at_columns, grid = columns(pos, sizes), torch.meshgrid(*map(torch.tensor, index), indexing="ij")
    out = torch.full((len(layers), B, len(at_columns[0]), *grid[0].shape), torch.nan, dtype=torch.float64)
    for i, j, c in itertools.product(*map(range, out.shape[:3])):
        if at_columns[j][c] is not None:
            parts = [
                seen[j][part, layers[i], at_columns[j][c]] for part, _ in PARTS.get(address.site, [(address.site, 0)])
            ]
            out[i, j, c] = torch.cat(parts, -1)[grid]
    return out[tuple(0 if d else slice(None) for d in dropped)]


@pytest.mark.parametrize("seed", range(CASES))
def test_edits_are_what_plain_indexing_makes(seed):
    sizes, places, edits, cells, _ = draw(seed)
    with torch.no_grad():
        seen = [{} for _ in range(B)]
        alone = [MODEL(IDS[i : i + 1, :n], tap=Row(cells[i], seen[i]), keep_state=True) for i, n in enumerate(sizes)]
        for backend in ("reference", "torch"):
            out = run(MODEL, IDS, edits, [p[0] for p in places], backend, lengths=sizes, keep_state=True)
            pairs = [(str(place[0]), out[place[0]], recorded(place, sizes, seen)) for place in places]
            for i, n in enumerate(sizes):
                pairs.append((f"logits of row {i}", out.logits[i, :n], alone[i].logits[0]))
                mine, theirs = (
                    out.state.ssm_state + out.state.conv_state,
                    alone[i].state.ssm_state + alone[i].state.conv_state,
                )
                pairs += [(f"state of row {i}", one[i], two[0]) for one, two in zip(mine, theirs, strict=True)]
            for name, one, two in pairs:
                scale = 1 + float(two.nan_to_num().abs().max())
                says = f"{backend}, {name}, lengths {sizes}: {edits}"
                torch.testing.assert_close(one / scale, two / scale, rtol=0, atol=1e-10, equal_nan=True, msg=says)


def test_the_cases_reach_everything():
    drawn = set().union(*(draw(seed)[-1] for seed in range(CASES)))
    assert drawn >= {*ADDRESSABLE, *KINDS, "Project keep", "full", "ones", "tail", "number", "ragged"}
