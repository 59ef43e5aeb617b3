"""Time scales against cases that can be worked out by hand."""

import math

import pytest
import torch
from helpers import tiny

from interp import Scale, Zero, at, run
from interp.timescales import decay_bands, half_lives, typical_dt
from minimal_mamba.errors import AddressError, InputError


def test_after_its_half_life_half_of_the_state_is_left():
    model = tiny()
    dt = torch.rand(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    lives = half_lives(model, dt)
    for i, layer in enumerate(model.backbone.layers):
        A = -layer.mixer.A_log.exp()
        left = torch.exp(dt[i][:, None] * A) ** lives[i]
        torch.testing.assert_close(left, torch.full_like(left, 0.5))
    torch.testing.assert_close(half_lives(model, 2 * dt), lives / 2)
    one = half_lives(model, 0.1)
    torch.testing.assert_close(one[1], math.log(2) / (0.1 * model.backbone.layers[1].mixer.A_log.exp()))


def test_the_typical_step_is_the_one_that_the_model_takes_where_dt_low_is_zero():
    model = tiny()
    ids = torch.arange(7)[None]
    out = run(model, ids, edits=[Zero(at.dt_low(layer=1))], record=[at.dt(layer=1)])
    torch.testing.assert_close(out[at.dt(layer=1)], typical_dt(model)[1].expand(1, 7, 24))


@pytest.mark.parametrize("bands", [1, 4, 7, [0.5, 2.0, 10.0], [1e9]])
def test_every_pair_is_in_one_band_and_bands_rise(bands):
    model = tiny()
    life = half_lives(model)[2]
    masks = decay_bands(model, -1, bands)
    assert torch.equal(sum(m.int() for m in masks), torch.ones(24, 5, dtype=torch.int32))
    ends = [(life[m].min(), life[m].max()) for m in masks if m.any()]
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
    if isinstance(bands, int):
        assert {int(m.sum()) for m in masks} <= {120 // bands, 120 // bands + 1}
    else:
        assert len(masks) == len(bands) + 1
        for mask, low, high in zip(masks, [0, *bands], [*bands, math.inf], strict=True):
            assert torch.equal(mask, (life >= low) & (life < high))


def test_bands_follow_the_step_size_that_is_given():
    model = tiny()
    dt = torch.ones(24, dtype=torch.float64)
    dt[:3] = 1e-6  # these channels remember for ever
    slow = decay_bands(model, 0, [1e4], dt=dt)[1]
    assert torch.equal(slow.any(1), torch.arange(24) < 3) and slow[:3].all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_band_can_be_edited(backend):
    model = tiny()
    ids = torch.arange(14).reshape(2, 7)
    mask = decay_bands(model, 1, 3)[1]
    place = at.ssm_state(layer=1)
    out = run(model, ids, edits=[Scale(place, ~mask)], record=[place], backend=backend)
    assert not out[place][:, :, mask].any() and out[place][:, :, ~mask].all()


def test_what_cannot_be_grouped_says_so():
    model = tiny()
    for bands in (0, 121, True, [], [2.0, 1.0], [-1.0], [0.0]):
        with pytest.raises(InputError, match="bands="):
            decay_bands(model, 0, bands)
    with pytest.raises(AddressError):
        decay_bands(model, 3)
    for dt in (-1.0, torch.ones(23), torch.full((24,), torch.nan)):
        with pytest.raises(InputError, match="dt has shape"):
            half_lives(model, dt)
