"""The table SITES against what the forward offers: names, axes, order."""

from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from interp import Add, at, run
from minimal_mamba import SITES, Tap
from minimal_mamba.sites import ADDRESSABLE, RECURRENT_STATE, Site

# pairwise distinct, so that no axis can stand for another
SIZES = {"b": 6, "l": 7, "d": 12, "e": 24, "n": 5, "r": 4, "k": 3, "v": 32, "layer": 2, "n+k": 8}
IDS = torch.randint(0, 29, (6, 7), generator=torch.Generator().manual_seed(2))
MODEL = tiny(n_layer=2)


def recorded_axes(site: Site) -> list[str]:
    """The axes of a recording over all layers and positions: layer first, then b l, then the features."""
    return [*(["layer"] if site.layered else []), "b", "l", *site.features]


def test_the_sizes_are_distinct_and_the_models_own() -> None:
    assert len(set(SIZES.values())) == len(SIZES)
    c = MODEL.config
    assert (c.d_model, c.d_inner, c.d_state, c.rank, c.d_conv, c.padded_vocab, c.n_layer) == (12, 24, 5, 4, 3, 32, 2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@torch.no_grad()
def test_axes_are_those_of_the_tensors(backend: str) -> None:
    addresses = {name: getattr(at, name)() for name in ADDRESSABLE}
    got = run(MODEL, IDS, record=addresses.values(), backend=backend)
    for name, site in ADDRESSABLE.items():
        assert tuple(got[addresses[name]].shape) == tuple(SIZES[a] for a in recorded_axes(site)), name


@torch.no_grad()
def test_the_forward_offers_the_axes_of_the_table_and_no_other_site() -> None:
    """What the tap itself is given: `l` along the sequence, none inside the recurrence, and every row is reached."""
    offered: dict[str, list[tuple[Any, ...]]] = {}

    class Spy(Tap):
        def __call__(self, site: str, value: Tensor, t: int | None = None) -> Tensor:
            offered.setdefault(site, []).append((tuple(value.shape), t))
            return value

    MODEL(IDS, tap=Spy())
    assert set(offered) == set(SITES)
    for name, site in SITES.items():
        shape = tuple(SIZES[a] for a in site.axes.split())
        times = list(range(7)) if site.per_position else [None]
        layers = 2 if site.layered else 1
        assert offered[name] == [(shape, t) for t in times] * layers, name


@pytest.mark.parametrize("name", ADDRESSABLE)
@torch.no_grad()
def test_an_int_drops_its_axis_and_a_slice_or_list_keeps_it(name: str) -> None:
    site, make = ADDRESSABLE[name], getattr(at, name)
    layers: list[tuple[Any, list[int]]] = [(1, []), ([1, 0], [2]), (slice(1), [1])] if site.layered else [(None, [])]
    positions: list[tuple[Any, list[int]]] = [(3, []), ([5], [1]), (slice(2, 6, 2), [2])]
    features: list[tuple[Any, list[int]]] = [(None, [SIZES[a] for a in site.features])]
    if name != RECURRENT_STATE.name:  # one channel of the first feature axis; the others stay
        rest = [SIZES[a] for a in site.features[1:]]
        features += [(2, rest), ([2, 0], [2, *rest]), (slice(1, 3), [2, *rest])]
    cases = []
    for layer, layer_axes in layers:
        for pos, pos_axes in positions:
            for chosen, feature_axes in features:
                fields = {"pos": pos} | ({} if layer is None else {"layer": layer})
                fields |= {} if chosen is None else {site.features[0]: chosen}
                cases.append((make(**fields), fields, [*layer_axes, 6, *pos_axes, *feature_axes]))
    everything = make()
    got = run(MODEL, IDS, record=[everything, *(address for address, *_ in cases)])
    whole = got[everything]
    for address, fields, shape in cases:
        assert list(got[address].shape) == shape, address
        want = whole
        lead = 3 if site.layered else 2  # from the last axis to the first, so that a dropped one shifts no other
        if site.features[0] in fields:
            want = want[(slice(None),) * lead + (fields[site.features[0]],)]
        want = want[(slice(None),) * (lead - 1) + (fields["pos"],)]
        want = want[fields["layer"]] if site.layered else want
        assert torch.equal(got[address], want), address


@torch.no_grad()
def test_recurrent_state_is_ssm_state_then_conv_state() -> None:
    places = [at.recurrent_state(), at.ssm_state(), at.conv_state()]
    got = run(MODEL, IDS, record=places)
    both, h, window = (got[place] for place in places)
    assert torch.equal(both, torch.cat([h, window], -1))
    assert RECURRENT_STATE.axes == "b e n+k" and RECURRENT_STATE.name not in SITES


@torch.no_grad()
def test_the_table_follows_the_forward() -> None:
    """An edit changes no site above its own, at the same layer and position; all but one reach the logits."""
    record = {name: getattr(at, name)(pos=3, **({"layer": 1} if site.layered else {})) for name, site in SITES.items()}
    clean = run(MODEL, IDS, record=record.values())
    moved = {}
    for name in SITES:
        got = run(MODEL, IDS, edits=[Add(record[name], 0.1)], record=record.values())
        far = {other: (got[record[other]] - clean[record[other]]).abs().max() for other in SITES}
        moved[name] = [other for other in SITES if far[other] > 1e-9]  # a touched token is a step: other rounding
    order = list(SITES)
    for name, changed in moved.items():
        assert changed[0] == name, f"{name} is not the first of {changed}"
    ends_here = {name for name, changed in moved.items() if changed == [name]}
    assert ends_here == {"conv_state", "logits"}  # conv_state acts on later tokens only
    for name in set(order) - ends_here:
        assert "logits" in moved[name], name
