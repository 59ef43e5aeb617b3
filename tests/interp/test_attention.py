"""Hidden attention: the sums are the run's own numbers, the weights are derivatives of its linear map."""

from dataclasses import replace

import pytest
import torch
from helpers import names_drawn, slow, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from interp import Set, at, attention, attention_map, contributions, gradients, logit_diff, run
from minimal_mamba.errors import AddressError, InputError, MambascopeError
from minimal_mamba.scan import causal_conv, selective_scan

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
MODEL = tiny(seed=6)
L, E = 9, MODEL.config.d_inner
IDS = torch.randint(0, 29, (2, L), generator=torch.Generator().manual_seed(0))
SITE = {"scan": "y", "block": "gated"}


def exact(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def recorded(model, ids, layer, *sites, **options):
    places = [getattr(at, site)(layer=layer) for site in sites]
    with torch.no_grad():
        out = run(model, ids, record=places, **options)
    return [out[p] for p in places]


@BOTH
@pytest.mark.parametrize(
    "changes", [{}, {"conv_bias": False}, {"bias": True}, {"d_conv": 2, "d_state": 1}, {"d_conv": 4}], ids=str
)
def test_the_sums_are_the_output(backend, changes):
    for length in (1, 2, 7, 33):
        model = tiny(seed=3, **changes)
        ids = torch.randint(0, 29, (2, length), generator=torch.Generator().manual_seed(length))
        for layer in (0, 2):
            y, gated, mixed = recorded(model, ids, layer, "y", "gated", "mixer_out")
            for form, output in (("scan", y), ("block", gated)):
                exact(attention(model, ids, layer=layer, form=form, backend=backend).reconstruct(), output)
                exact(contributions(model, ids, layer=layer, form=form, backend=backend).total(), mixed)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_weights_are_the_derivatives_of_the_linear_map(layer):
    """With dt, B, C, sigmoid(conv) and gate held, y is linear in u and gated affine in x: autograd has the matrix."""
    m = MODEL.backbone.layers[layer].mixer
    x, conv, u, dt, B, C, gate = recorded(MODEL, IDS[:1], layer, "x", "conv", "u", "dt", "B", "C", "gate")
    A, h, window = -m.A_log.exp().detach(), torch.zeros(1, E, 5).double(), torch.zeros(1, E, 3).double()

    def scan(u):
        return selective_scan(u, dt, A, B, C, h)[0].sum((0, 2))  # channels do not mix, so their sum keeps them apart

    def block(x):
        u = torch.sigmoid(conv) * causal_conv(x, m.conv1d.weight.detach()[:, 0], m.conv1d.bias.detach(), window)[0]
        return (gate * (selective_scan(u, dt, A, B, C, h)[0] + m.D.detach() * u)).sum((0, 2))

    for form, fn, given in (("scan", scan, u), ("block", block, x)):
        found = attention(MODEL, IDS[:1], layer=layer, form=form)
        exact(found.weights, torch.autograd.functional.jacobian(fn, given).permute(1, 0, 2, 3))
        exact(found.inputs, given)
        exact(found.constant.sum(-1)[0], fn(torch.zeros_like(given)))
        t, s = torch.triu_indices(L, L, 1)
        assert not found.weights[:, t, s].any() and found.weights.abs().max() > 0.1


def test_the_scan_weights_are_the_gradient_of_a_run_with_a_fixed_selection():
    """Through the last layer of the whole model: dt, B, C held by edits, what u_s does to y_t is the weight."""
    dt, B, C = recorded(MODEL, IDS, 2, "dt", "B", "C")
    held = [Set(getattr(at, site)(layer=2), v) for site, v in (("dt", dt), ("B", B), ("C", C))]
    y, u = at.y(layer=2, pos=-1), at.u(layer=2, pos=4)
    grads = gradients(MODEL, IDS, lambda x: logit_diff(x, 3, 5), [y, u], held)
    weight = attention(MODEL, IDS, layer=2, form="scan", targets=-1, sources=[4]).weights[:, 0, 0]
    exact(grads[u], grads[y] * weight)
    assert grads[u].abs().max() > 1e-3


@pytest.mark.parametrize("form", ["scan", "block"])
def test_chosen_rows_columns_and_channels_are_parts_of_the_whole(form):
    whole = attention(MODEL, IDS, layer=1, form=form)
    for budget in (1 << 23, 2 * 5 * 8 * 7, 2 * 5 * 8):  # all at once, seven cells of (target, channel), one
        some = attention(
            MODEL, IDS, layer=1, form=form, targets=[5, -1, 2], sources=slice(1, 6), channels=[20, 3, 4], budget=budget
        )
        exact(some.weights, whole.weights[:, [5, 8, 2], 1:6][..., [20, 3, 4]])
        exact(some.constant, whole.constant[:, [5, 8, 2]][..., [20, 3, 4]])
        exact(some.inputs, whole.inputs[:, 1:6][..., [20, 3, 4]])
        assert some.targets.tolist() == [[5, 8, 2]] * 2 and some.channels.tolist() == [20, 3, 4]
    added = contributions(MODEL, IDS, layer=1, form=form)
    part = contributions(MODEL, IDS, layer=1, form=form, targets=[5, 2], sources=[3, 0], budget=400)
    exact(part.values, added.values[:, [5, 2]][:, :, [3, 0]])
    exact(part.constant, added.constant[:, [5, 2]])


@pytest.mark.parametrize("form", ["scan", "block"])
def test_the_reductions_are_what_they_say(form):
    whole = attention(MODEL, IDS, layer=1, form=form)
    few = attention(MODEL, IDS, layer=1, form=form, channels=slice(2, 9))
    for budget in (1 << 23, 2 * 5 * 8 * 3):

        def reduced(how, budget=budget, **options):
            found = attention(MODEL, IDS, layer=1, form=form, reduce=how, budget=budget, **options)
            assert found.inputs is None and found.weights.shape == (2, L, L)
            return found.weights

        exact(reduced("mean"), whole.weights.mean(-1))
        exact(reduced("mean_abs"), whole.weights.abs().mean(-1))
        exact(reduced("mean_abs", channels=slice(2, 9)), few.weights.abs().mean(-1))
        exact(reduced("norm"), contributions(MODEL, IDS, layer=1, form=form).values.norm(dim=-1))
        gate = recorded(MODEL, IDS, 1, "gate")[0][:, :, None] if form == "scan" else 1.0
        brought = (gate * whole.weights * whole.inputs[:, None])[..., 2:9]
        out = MODEL.backbone.layers[1].mixer.out_proj.weight.detach()[:, 2:9]
        exact(reduced("norm", channels=slice(2, 9)), (brought @ out.T).norm(dim=-1))


@BOTH
def test_padded_rows_are_what_they_are_alone(backend):
    lengths = [9, 4]
    for form in ("scan", "block"):
        options = {"layer": 1, "form": form, "backend": backend}
        both = attention(MODEL, IDS, targets=[-1, 0, -3], lengths=lengths, **options)
        added = contributions(MODEL, IDS, targets=[-1, 0, -3], sources=[0, -2], lengths=lengths, **options)
        assert both.targets.tolist() == [[8, 0, 6], [3, 0, 1]] and added.sources.tolist() == [[0, 7], [0, 2]]
        for row, size in enumerate(lengths):
            ids = IDS[row : row + 1, :size]
            alone = attention(MODEL, ids, targets=[-1, 0, -3], **options)
            exact(both.weights[row, :, :size], alone.weights[0])
            exact(both.constant[row], alone.constant[0])
            assert not both.weights[row, :, size:].any()
            exact(
                added.values[row],
                contributions(MODEL, IDS[row : row + 1, :size], targets=[-1, 0, -3], sources=[0, -2], **options).values[
                    0
                ],
            )


def test_float32_stays_finite_where_quotients_of_decays_overflow():
    """dt of some ten and A to -40 underflow any product of decays within a token or two: no weight is lost to NaN."""
    model = tiny(seed=6, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.dt_proj.bias.add_(10)
            layer.mixer.A_log.add_(3)
    ids = torch.randint(0, 29, (1, 63), generator=torch.Generator().manual_seed(1))
    for form in ("scan", "block"):
        found = attention(model, ids, layer=1, form=form)
        y = recorded(model, ids, 1, SITE[form])[0]
        assert found.weights.isfinite().all()
        assert (found.reconstruct() - y).norm() < 1e-5 * y.norm()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers = max(self.numbers, storage)
        return out


@pytest.mark.parametrize(("form", "reduce"), [("scan", "mean_abs"), ("block", "mean"), ("block", "norm")])
def test_nothing_large_is_made(form, reduce):
    """The largest tensor is what is returned (l, l), or one that the run makes, or within the budget."""
    l, numbers = 60, 4000
    ids = torch.randint(0, 29, (1, l), generator=torch.Generator().manual_seed(1))
    with Largest() as run_alone:
        recorded(MODEL, ids, 1, "u", backend="reference")
    with Largest() as seen:
        attention(MODEL, ids, layer=1, form=form, reduce=reduce, budget=8 * numbers, backend="reference")
    assert seen.numbers <= max(l * l, run_alone.numbers, numbers) < E * l * l / 10


def test_bfloat16_weights_are_taken_apart_in_float32():
    model = tiny(seed=6, dtype=torch.bfloat16)
    y = recorded(model, IDS, 1, "y")[0]
    found = attention(model, IDS, layer=1, form="scan").reconstruct()
    assert found.dtype == y.dtype == torch.float32 and (found - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"form": "blocks"}, InputError, "Did you mean 'block'"),
        ({"reduce": "mean_ab"}, InputError, "Did you mean 'mean_abs'"),
        ({"layer": 3}, AddressError, "layer=3 does not exist"),
        ({"layer": [0, 1]}, InputError, "one layer"),
        ({"targets": 9}, AddressError, "targets=9 does not exist"),
        ({"sources": [0, -9]}, AddressError, "twice"),
        ({"channels": 24}, AddressError, "e=24 does not exist"),
        ({"budget": 10}, InputError, "budget=10 bytes"),
        ({"lengths": [9, 4]}, InputError, "unequal numbers"),
        ({"lengths": [9, 4], "targets": slice(-5, None)}, InputError, "Name as many in each"),
    ],
)
def test_what_cannot_be_shown_is_said(options, kind, says):
    with pytest.raises(kind, match=says) as caught:
        attention(MODEL, IDS, **{"layer": 0} | options)
    assert isinstance(caught.value, MambascopeError)


def test_a_reduced_map_cannot_be_summed_up():
    with pytest.raises(InputError, match="needs reduce=None"):
        attention(MODEL, IDS, layer=0, reduce="mean").reconstruct()


def test_the_map_shows_the_weights_and_hides_what_is_later():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = attention(MODEL, IDS, layer=1, targets=[3, 5, 8], reduce="norm")
    tokens = [f"w{i}" for i in range(L)]
    image = attention_map(found, tokens=tokens).images[0]
    shown = image.get_array()
    later = torch.arange(L) > found.targets[0][:, None]
    assert (torch.from_numpy(shown.mask) == later).all()
    exact(torch.from_numpy(shown.data)[~later], found.weights.mean(0)[~later])
    assert image.get_clim() == (0, found.weights.mean(0).max())
    assert [t.get_text() for t in image.axes.get_yticklabels()] == ["w3", "w5", "w8"]
    one = attention(MODEL, IDS, layer=1, channels=[4])
    image = attention_map(one, row=1, limit=0.5).images[0]
    exact(torch.from_numpy(image.get_array().data), one.weights[1, ..., 0])
    assert image.get_clim() == (-0.5, 0.5)
    plt.close("all")
    with pytest.raises(InputError, match="pass reduce="):
        attention_map(attention(MODEL, IDS, layer=1))
    with pytest.raises(InputError, match="3 labels for 9"):
        attention_map(found, tokens=tokens[:3])
    ragged = attention(MODEL, IDS, layer=1, targets=-1, lengths=[9, 4], reduce="mean")
    with pytest.raises(InputError, match="choose row="):
        attention_map(ragged)
    attention_map(ragged, row=1)
    plt.close("all")


def test_weights_that_are_not_finite_leave_the_scale_of_the_map_alone():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = attention(MODEL, IDS, layer=1, reduce="mean")
    holed = found.weights.clone()
    holed[:, 5, 2] = float("nan")
    ax = attention_map(replace(found, weights=holed))
    ax.figure.canvas.draw()
    rest = holed.mean(0)[~holed.mean(0).isnan()].abs().max()
    assert ax.images[0].get_clim() == (-rest, rest)
    (path,) = ax.collections[0].get_paths()  # and not what is later, which is left out on purpose
    assert path.get_extents().get_points().mean(0).tolist() == [2.0, 5.0]
    assert "hatched" in ax.figure.axes[1].get_ylabel()
    image = attention_map(replace(found, weights=0 * found.weights), colorbar=False).images[0]
    assert image.cmap(image.norm(0.0)) == image.cmap(0.5)
    with pytest.raises(InputError, match="ends above 0"):
        attention_map(found, limit=-1)
    plt.close("all")


@pytest.mark.parametrize("size", [(3.4, 3.0), *slow(((6.8, 6.0),))])
def test_names_that_do_not_fit_the_map_are_left_out(size):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = attention(MODEL, torch.arange(64)[None] % 29, layer=1, reduce="norm")
    for tokens in (None, [f"{i} incomprehensible" for i in range(64)]):
        ax = attention_map(found, tokens=tokens, ax=plt.subplots(figsize=size, constrained_layout=True)[1])
        across, down = names_drawn(ax, "x"), names_drawn(ax, "y")
        assert len(across) >= (7 if tokens is None else 13) and len(down) >= 7 and max(map(len, down)) <= 12
    ax = attention_map(found, tokens=["$$", "\n"] * 32)
    assert names_drawn(ax, "x")[0] == names_drawn(ax, "y")[0] == r"\$\$"
    plt.close("all")
