"""dMetric/dSite against finite differences of runs under `Add`."""

import pytest
import torch
from helpers import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp import Add, Mean, Scale, Set, Zero, accuracy, at, attribution_grid, gradients, logit_diff, run
from kernels_bridge import torch_ops
from minimal_mamba.errors import EditError, InputError, MambascopeError, NotRecorded
from minimal_mamba.sites import ADDRESSABLE

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
MODEL = tiny(seed=4)
CONFIG = MODEL.config
IDS = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = [4, 7, 5]


def where(site, **fields):
    return getattr(at, site)(**(fields | ({"layer": 1} if ADDRESSABLE[site].layered else {})))


def metric(logits):
    return logit_diff(logits[:, -1], 3, 5) + 0.5 * logits[:, -1, 7] ** 2 / 10


def spread(logits):
    """A metric of every position, so that no site is beside the point."""
    weight = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    return (torch.tanh(logits) * weight).sum((1, 2))


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numeric(place, direction, measure, eps=1e-6, **kwargs):
    """(b,) the derivative of each row's metric along a direction."""
    edits = list(kwargs.pop("edits", []))
    last = kwargs.get("lengths") is not None
    with torch.no_grad():
        up, down = (
            run(MODEL, IDS, [*edits, Add(place, s * eps * direction)], last_only=last, **kwargs) for s in (1, -1)
        )
    return (measure(up.logits) - measure(down.logits)) / (2 * eps)


@BOTH
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("site", list(ADDRESSABLE))
def test_against_finite_differences(site, padded, backend):
    extra = {"lengths": LENGTHS} if padded else {}
    measure = metric if padded else spread
    places = [where(site), where(site, pos=-2), where(site, pos=[3, 0])]
    found = gradients(MODEL, IDS, measure, places, backend=backend, **extra)
    recorded = run(MODEL, IDS, record=places, backend=backend, **extra)
    with torch.no_grad():
        same = measure(run(MODEL, IDS, backend=backend, last_only=padded, **extra).logits)
    torch.testing.assert_close(found.values, same, rtol=1e-11, atol=1e-11)
    for place in places:
        assert found[place].shape == recorded[place].shape
        for seed in range(2):
            direction = noise(found[place].shape, seed)
            if padded and place is places[0]:
                tokens = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
                direction = direction * tokens.reshape(3, 7, *[1] * (direction.dim() - 2))
                assert not found[place][~tokens].any()
            wanted = numeric(place, direction, measure, backend=backend, **extra)
            got = (found[place] * direction).flatten(1).sum(1)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert found[places[0]].abs().max() > 1e-5


@BOTH
def test_layers_and_channels(backend):
    places = [
        at.ssm_state(pos=2, e=[4, 1], n=3),
        at.u(layer=[2, 0], e=5),
        at.conv_state(layer=[0], pos=slice(1, 3), k=[0, 2]),
    ]
    found = gradients(MODEL, IDS, spread, places, backend=backend)
    assert [tuple(found[p].shape) for p in places] == [(3, 3, 2), (2, 3, 7), (1, 3, 2, 24, 2)]
    for place in places:
        direction = noise(found[place].shape)
        got = (found[place] * direction).sum(dim=[d for d in range(direction.dim()) if d != 1])
        torch.testing.assert_close(got, numeric(place, direction, spread, backend=backend), rtol=1e-6, atol=1e-6)


@BOTH
def test_ssm_state_propagates_and_state_read_is_local(backend):
    """Closed form in the last layer, for a metric that reads y at one position only."""
    t, p, layer = 5, 2, CONFIG.n_layer - 1
    names = {n: getattr(at, n)(layer=layer) for n in ("dt", "C")}
    base = run(MODEL, IDS, record=list(names.values()), backend=backend)
    dt, C = (base[names[n]].detach() for n in ("dt", "C"))
    state, read = at.ssm_state(layer=layer, pos=p), at.state_read(layer=layer, pos=p)
    y = at.y(layer=layer, pos=t)

    def at_t(logits):
        return spread(logits[:, t : t + 1])

    found = gradients(MODEL, IDS, at_t, [state, read, y], backend=backend)
    A = -torch.exp(MODEL.backbone.layers[layer].mixer.A_log.detach())
    carried = torch.exp(A * dt[:, p + 1 : t + 1].sum(1)[..., None])
    expected = found[y][..., None] * C[:, t, None] * carried  # dM/dy_t C_t exp(A (S_t - S_p))
    torch.testing.assert_close(found[state], expected, rtol=1e-10, atol=1e-12)
    assert found[state].abs().max() > 1e-4
    assert not found[read].any()  # y_p is not read by the metric, and the state is not touched
    here = gradients(MODEL, IDS, at_t, [at.state_read(layer=layer, pos=t)], backend=backend)
    torch.testing.assert_close(
        here[at.state_read(layer=layer, pos=t)], found[y][..., None] * C[:, t, None], rtol=1e-10, atol=1e-12
    )


@BOTH
def test_zero_where_the_metric_does_not_depend(backend):
    late = [at.ssm_state(layer=1, pos=5), at.resid_post(layer=0, pos=4), at.state_read(pos=6), at.conv_state(pos=3)]
    found = gradients(MODEL, IDS, lambda logits: spread(logits[:, :4]), late, backend=backend)
    for place in late:
        assert not found[place].any()
    unread = gradients(MODEL, IDS, lambda logits: logits[:, -1, 3], [at.logits()], backend=backend)[at.logits()]
    assert unread[:, -1, 3].eq(1).all()
    assert unread.sum() == 3


def test_no_readable_steps_for_the_gradient_of_the_state(monkeypatch):
    steps = []
    real = torch_ops.ssm_step
    monkeypatch.setattr(torch_ops, "ssm_step", lambda *a, **k: steps.append(k["t"]) or real(*a, **k))
    free = [site for site in ADDRESSABLE if not ADDRESSABLE[site].per_position] + ["ssm_state", "state_write"]
    gradients(MODEL, IDS, spread, [where(site) for site in free if site != "recurrent_state"], backend="torch")
    assert steps == []
    gradients(MODEL, IDS, spread, [where("state_read", pos=3)], backend="torch")
    assert steps == [3]


@BOTH
@pytest.mark.parametrize("site", ["ssm_state", "state_read", "u", "recurrent_state", "state_write"])
def test_together_with_edits_at_the_same_place(site, backend):
    """The gradient is that of adding after all edits: a Set before it does not cut it off."""
    place = where(site, pos=2)
    value = noise(run(MODEL, IDS, record=[place])[place].shape, 5)
    for edits in ([Set(place, value)], [Scale(place, 2.0), Add(where(site, pos=3), value)]):
        found = gradients(MODEL, IDS, spread, [place, where("ssm_state")], edits=edits, backend=backend)
        for wrt in (place, where("ssm_state")):
            direction = noise(found[wrt].shape, 1)
            wanted = numeric(wrt, direction, spread, edits=edits, backend=backend)
            torch.testing.assert_close((found[wrt] * direction).flatten(1).sum(1), wanted, rtol=1e-6, atol=1e-6)
        assert found[place].abs().max() > 1e-5


@BOTH
def test_with_a_carried_state(backend):
    first = run(MODEL, IDS[:, :3], keep_state=True, backend=backend)
    place = at.ssm_state(layer=0, pos=4)
    whole = gradients(MODEL, IDS, lambda x: spread(x[:, 3:]), [place], backend=backend)[place]
    rest = gradients(MODEL, IDS[:, 3:], spread, [place], state=first.state, backend=backend)[place]
    torch.testing.assert_close(rest, whole, rtol=1e-10, atol=1e-12)


def test_works_under_no_grad_with_frozen_weights_and_leaves_no_gradient():
    model = tiny(seed=4).requires_grad_(False)
    with torch.no_grad():
        found = gradients(model, IDS, spread, [at.u(layer=1)])
    torch.testing.assert_close(found[at.u(layer=1)], gradients(MODEL, IDS, spread, [at.u(layer=1)])[at.u(layer=1)])
    assert all(p.grad is None for p in MODEL.parameters())
    copy = found[at.u(layer=1)]
    copy.zero_()
    assert found[at.u(layer=1)].any()


@BOTH
def test_works_under_inference_mode(backend):
    places = [at.ssm_state(layer=1, pos=3), at.u(layer=0)]
    value = noise((3, CONFIG.d_inner), 3)
    edits = [Scale(at.u(layer=2, pos=1), value)]
    wanted = gradients(MODEL, IDS, spread, places, edits=edits, backend=backend)
    with torch.inference_mode():
        found = gradients(MODEL, IDS.clone(), spread, places, edits=edits, backend=backend, lengths=[7, 7, 7])
        kept = run(MODEL, IDS, keep_state=True, backend=backend)
        assert torch.is_inference_mode_enabled()
        made = Scale(at.u(layer=2, pos=1), value.clone())
    for place in places:
        assert found[place].shape == wanted[place].shape and not found[place].is_inference()
        assert found[place].any()
    for what, kwargs in (("the state", {"state": kept.state}), ("an edit", {"edits": [made]})):
        with pytest.raises(InputError, match=rf"{what} holds tensors made under torch.inference_mode\(\)"):
            gradients(MODEL, IDS, spread, places, backend=backend, **kwargs)
    with torch.inference_mode():
        model = tiny(seed=4)
    with pytest.raises(InputError, match=r"the model holds tensors made under torch.inference_mode"):
        gradients(model, IDS, spread, places, backend=backend)


def test_one_address_or_several_but_not_none():
    place = at.u(layer=1)
    one = gradients(MODEL, IDS, spread, place, Zero(at.u(layer=0, pos=1)))
    assert torch.equal(one[place], gradients(MODEL, IDS, spread, [place], [Zero(at.u(layer=0, pos=1))])[place])
    assert one == one and one != gradients(MODEL, IDS, spread, place) and len({one, one}) == 1
    with pytest.raises(InputError, match="wrt is empty: name at least one address"):
        gradients(MODEL, IDS, spread, [])
    with pytest.raises(EditError, match=r"Zero\(u.* is given where addresses and not edits are meant"):
        gradients(MODEL, IDS, spread, [Zero(place)])


def test_what_has_no_gradient_says_so():
    place = at.u(layer=1)
    with pytest.raises(MambascopeError, match=r"without a gradient \(an argmax"):
        gradients(MODEL, IDS, lambda x: accuracy(x, 3), [place])
    with pytest.raises(
        MambascopeError, match=r"maps logits \(b, l, v\) to \(3,\), one number a row; this one gave \(3, 7\)"
    ) as caught:
        gradients(MODEL, IDS, lambda x: x[..., 0], [place])
    assert isinstance(caught.value, ValueError)
    with pytest.raises(MambascopeError, match="this one gave float"):
        gradients(MODEL, IDS, lambda x: 1.0, [place])
    with pytest.raises(
        NotRecorded, match=r"no gradient of z\(layer=0, pos=:\) was asked for; there are u\(layer=1, pos=:\)"
    ):
        gradients(MODEL, IDS, spread, [place])[at.z(layer=0)]


def test_a_mean_over_the_batch_has_no_gradient_of_one_row():
    place = at.u(layer=0, pos=2)
    mean = run(MODEL, IDS, record=at.u(layer=1, pos=3))[at.u(layer=1, pos=3)].mean(0)
    with pytest.raises(EditError, match=r"no row has a gradient of its own\. Give the mean"):
        gradients(MODEL, IDS, metric, place, Mean(at.u(layer=1, pos=3)))
    with pytest.raises(EditError, match="Give the mean"):
        attribution_grid(MODEL, IDS, IDS, site="u", metric=metric, edits=Mean(at.u(layer=1, pos=3)), progress=False)
    assert gradients(MODEL, IDS, metric, place, Mean(at.u(layer=1, pos=3), mean))[place].abs().max() > 0


class Counted(TorchDispatchMode):
    """Counts the numbers that torch's operations make."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x._is_view())
        return out


@BOTH
@pytest.mark.parametrize("shorter", [0, 1])
def test_gradients_at_every_position_take_time_in_proportion(shorter, backend):
    """Not its square: an index into all positions, at each of them, has a backward as large as all of them."""
    made = []
    for l in (64, 256):
        place = at.ssm_state(layer=[0, 2], pos=slice(-l // 2, None))
        with Counted() as counted:
            gradients(MODEL, torch.zeros(2, l, dtype=torch.long), spread, [place],
                      edits=[Add(at.state_write(layer=1), torch.ones(2, l, 24, 5).double().requires_grad_())],
                      lengths=[l, l - shorter], backend=backend)  # fmt: skip
        made.append(counted.made)
    assert made[1] < 4.3 * made[0], made
