"""Relevance: conserved to the last digits, the equations of LRP in numpy, HF's model under the rules, every backend."""

import dataclasses
import functools
import importlib
import re

import numpy as np
import pytest
import torch
from helpers import error, near, tiny
from stand_ins import STAND_INS, register
from torch.nn import functional as F

from interp import Add, Apply, Mean, Scale, Set, Zero, accuracy, at, gradients, log_prob, logit_diff, relevance, run
from interp.relevance import CONSTANT
from kernels_bridge.harness.targets import transformers_model
from minimal_mamba import SITES
from minimal_mamba.errors import EditError, InputError, MetricError, NotReached, NotRecorded
from minimal_mamba.sites import ADDRESSABLE

IDS = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 7, 6]
PLAIN = {"conv_bias": False}
KINDS = {
    "no bias": PLAIN,
    "conv bias": {},
    "every bias": {"bias": True, "rms_norm": False, "tie_embeddings": False},
    "FalconMamba": {"mixer_rms_eps": 0.3, "bias": True},
    "FalconMamba, no bias": {"mixer_rms_eps": 0.3, "conv_bias": False},
    "one layer, d_conv 1, d_state 1": {"n_layer": 1, "d_conv": 1, "d_state": 1},
}
SHARED = [name for name in ADDRESSABLE if name not in CONSTANT]


@functools.cache
def model_of(kind):
    return tiny(seed=4, **KINDS[kind])


def linear(logits):
    """A metric that is linear in all logits."""
    weight = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (logits * weight.to(logits)).sum((1, 2))


def difference(logits):
    return logit_diff(logits, 3, 5)


def every(sites=tuple(SHARED)):
    return [getattr(at, site)() for site in sites]


def total(found, address):
    """Of each row (layers, b) or (b,)."""
    return found.summed(address).sum(-1)


@pytest.fixture(params=["reference", "torch", "compiled", "fused"])
def backend(request, monkeypatch):
    """Each backend; the kernels of `fused` are stood in for, in float64, but those that the rules would not reach."""
    if request.param == "fused":
        register(dataclasses.replace(STAND_INS, layer_norm_fn=None, mamba_inner_fn=None), monkeypatch)
    return request.param


# -- conservation -----------------------------------------------------------------------------------------------------


def kept_by_biases(model, ids):
    """(layers + 1, b): what the biases after a cut keep, the embedding's first, by the z-rule: R_j b / z_j each."""
    places = {name: getattr(at, name)() for name in ("mixer_in", "x", "z", "conv", "mixer_out", "final_norm")}
    found = relevance(model, ids, linear, [*places.values()])
    base = run(model, ids, record=[*places.values()])

    def kept(name, bias, layer=slice(None)):
        if bias is None:
            return 0.0
        return (found[places[name]][layer] / base[places[name]][layer] * bias).sum((1, 2)).detach()

    shares = []
    for i, layer in enumerate(model.backbone.layers):
        m, both = layer.mixer, layer.mixer.in_proj.bias
        halves = (None, None) if both is None else both.chunk(2)
        shares.append(
            kept("mixer_in", getattr(layer.norm, "bias", None), i) + kept("x", halves[0], i) + kept("z", halves[1], i)
            + kept("conv", m.conv1d.bias, i) + kept("mixer_out", m.out_proj.bias, i)
        )  # fmt: skip
    last = kept("final_norm", getattr(model.backbone.norm_f, "bias", None))
    shares = [torch.zeros(len(ids), dtype=torch.float64) + share for share in (*shares, last)]
    return torch.stack(shares).flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_shares_out_the_metric(kind):
    model = model_of(kind)
    cuts = every(("embed", "resid_post"))
    found, kept = relevance(model, IDS, linear, cuts), kept_by_biases(model, IDS)
    whole = torch.cat([total(found, cuts[0])[None], total(found, cuts[1])]) + kept
    torch.testing.assert_close(whole, found.values.expand_as(whole), rtol=1e-11, atol=1e-11)
    near(found.values, linear(run(model, IDS).logits).detach(), 1e-13)
    biased = any(
        p.any() for name, p in model.named_parameters() if re.search("(norm|norm_f|in_proj|conv1d).bias", name)
    )
    assert biased == bool(kept[0].abs().min() > 1e-3)


def test_without_biases_it_is_the_metric_and_gradient_x_input_is_not():
    """Also at every position's own logits; the control is off by more than the metric's own size."""
    model = model_of("no bias")
    for metric in (linear, difference, lambda logits: logits[:, 2, 7]):
        cuts = every(("embed", "resid_pre", "resid_post"))
        found = relevance(model, IDS, metric, cuts)
        for cut in cuts:
            torch.testing.assert_close(
                total(found, cut), found.values.expand_as(total(found, cut)), rtol=1e-11, atol=1e-11
            )
        plain, base = gradients(model, IDS, metric, cuts), run(model, IDS, record=cuts)
        product = (plain[cuts[0]] * base[cuts[0]]).sum((1, 2)).detach()
        assert (product - found.values).abs().max() > 0.5 * found.values.abs().max()


def test_of_a_metric_that_bends_the_logits_share_out_the_slope():
    model, cut = model_of("no bias"), at.resid_post(layer=1)
    found = relevance(model, IDS, lambda logits: log_prob(logits, 3), [cut, at.logits()])
    torch.testing.assert_close(total(found, cut), total(found, at.logits()), rtol=1e-11, atol=1e-11)
    assert (total(found, cut) - found.values).abs().min() > 0.01


# -- the equations, in numpy ------------------------------------------------------------------------------------------


def through(W, a, z, R):
    """R_i = sum_j W_ji a_i / z_j R_j, of (l, i) inputs and (l, j) outputs z, whose biases keep their share."""
    return a * ((R / z) @ W)


def norm_back(x, y, R, w, eps, rms):
    """RMSNorm hands on what it gets, number by number; of LayerNorm y_j takes w_j (x_j - mean x) / s."""
    if rms:
        return R
    s = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + eps)
    W = np.diag(w) @ (np.eye(len(w)) - 1 / len(w))
    return x * ((R / y / s) @ W)


def lrp(model, v, weight, before):
    """One row, by the z-rule from the logits down: the relevance of every site, (layers, l, ...) or (l, ...).

    Args:
        v: the values of the sites. weight: (l, v) of the metric. before: the layers' (h, window) before the row.
    """
    c, p = model.config, {name: q.detach().numpy() for name, q in model.named_parameters()}
    p.setdefault("lm_head.weight", p["backbone.embedding.weight"])
    l, k, R = len(weight), c.d_conv, {name: [None] * c.n_layer for name in v}
    R["logits"] = v["logits"] * weight
    R["final_norm"] = through(p["lm_head.weight"], v["final_norm"], v["logits"], R["logits"])
    stream = norm_back(
        v["resid_post"][-1], v["final_norm"], R["final_norm"], p["backbone.norm_f.weight"], c.norm_eps, c.rms_norm
    )
    R["state"] = [None] * c.n_layer
    for i in reversed(range(c.n_layer)):
        a = {name: value[i] for name, value in v.items() if SITES[name].layered}
        name, (h0, window) = f"backbone.layers.{i}.", before[i]
        r = {"resid_post": stream, "mixer_out": stream * a["mixer_out"] / a["resid_post"]}
        r["gated"] = through(p[name + "mixer.out_proj.weight"], a["gated"], a["mixer_out"], r["mixer_out"])
        r["ssm_out"] = r["gate"] = r["gated"] / 2
        r["z"] = r["gate"]
        r["y"], r["skip"] = (r["ssm_out"] * a[part] / a["ssm_out"] for part in ("y", "skip"))
        r["state_read"] = (r["y"] / a["y"])[..., None] * a["C"][:, None] * a["state_read"]
        r["u"], later = r["skip"].copy(), 0.0
        r["ssm_state"], r["state_write"] = np.zeros_like(a["ssm_state"]), np.zeros_like(a["ssm_state"])
        for t in reversed(range(l)):
            r["ssm_state"][t] = r["state_read"][t] + later
            share = r["ssm_state"][t] / a["ssm_state"][t]
            r["state_write"][t] = share * a["state_write"][t]
            later = share * a["decay"][t] * (a["ssm_state"][t - 1] if t else h0)
            r["u"][t] += r["state_write"][t].sum(-1)
        r["conv"] = r["u"]
        taps, share = p[name + "mixer.conv1d.weight"][:, 0], r["conv"] / a["conv"]
        inputs = np.concatenate([window.T, a["x"]])  # (k + l, e): token t is k + t, and its window ends there
        r["x"], conv_state = np.zeros_like(a["x"]), np.zeros((l + 1, *window.shape))
        for t in range(l):
            for j in range(k):  # conv_t takes taps[k - 1 - j] x_{t-j}
                part = taps[:, k - 1 - j] * inputs[k + t - j] * share[t]
                if t - j >= 0:
                    r["x"][t - j] += part
                for s in range(max(-1, t - j), t):  # the windows that hold x_{t-j} until t
                    conv_state[s + 1, :, k - 1 - (s - (t - j))] += part
        r["conv_state"] = conv_state[1:]
        r["recurrent_state"] = np.concatenate([r["ssm_state"], r["conv_state"]], -1)
        both = np.concatenate([a["x"], a["z"]], -1), np.concatenate([r["x"], r["z"]], -1)
        r["mixer_in"] = through(p[name + "mixer.in_proj.weight"], a["mixer_in"], *both)
        stream = stream * a["resid_pre"] / a["resid_post"] + norm_back(
            a["resid_pre"], a["mixer_in"], r["mixer_in"], p[name + "norm.weight"], c.norm_eps, c.rms_norm
        )
        r["resid_pre"] = stream
        for site, value in r.items():
            R.setdefault(site, [None] * c.n_layer)[i] = value
        R["state"][i] = later, conv_state[0]
    R["embed"] = stream
    return R


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_what_the_equations_say(kind, carried):
    model, b = model_of(kind), len(IDS)
    first = torch.randint(0, 29, (b, 5), generator=torch.Generator().manual_seed(8))
    state = run(model, first, keep_state=True).state if carried else None
    with torch.no_grad():
        base = run(model, IDS, record=every(tuple(SITES)), state=state)
    before = state or model.initial_state(b)
    weight = torch.randn(base.logits.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    found = relevance(model, IDS, linear, every(), state=state)
    for row in range(b):
        v = {name: base[getattr(at, name)()].movedim(int(site.layered), 0)[row].numpy() for name, site in SITES.items()}
        memory = [(h[row].detach().numpy(), w[row].detach().numpy())
                  for h, w in zip(before.ssm_state, before.conv_state, strict=True)]  # fmt: skip
        want = lrp(model, v, weight, memory)
        for name in SHARED:
            got = found[getattr(at, name)()].movedim(int(ADDRESSABLE[name].layered), 0)[row]
            near(got, torch.tensor(np.array(want[name])), 1e-10)
            assert got.abs().max() > 1e-4 or (name == "conv_state" and model.config.d_conv == 1)
        if carried:
            for i, (h, window) in enumerate(want["state"]):
                near(found.state.ssm_state[i][row], torch.tensor(h), 1e-10)
                near(found.state.conv_state[i][row], torch.tensor(window), 1e-10)
    assert carried == (found.state is not None)


# -- MambaLRP's rules on HF's model -----------------------------------------------------------------------------------


class Ruled:
    """torch.nn.functional, but for silu."""

    @staticmethod
    def silu(x):
        return x * (F.silu(x) / x).detach()

    def __getattr__(self, name):
        return getattr(F, name)


def hf_relevance(model, ids, monkeypatch, without=None):
    """Of the embeddings, by gradient x input: the rules of MambaLRP's slow path, put on HF's model from outside."""
    theirs = transformers_model(model).eval()
    kind = "falcon_mamba" if model.config.mixer_rms_eps else "mamba"
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")

    def norm(module, given, out):
        size = given[0].square().mean(-1, keepdim=True) + module.variance_epsilon
        return given[0] * torch.rsqrt(size).detach() * module.weight

    if without != "silu":
        monkeypatch.setattr(modeling, "F", Ruled())
        monkeypatch.setattr(modeling, "ACT2FN", {"silu": Ruled.silu})
    for module in (theirs.backbone.norm_f, *(block.norm for block in theirs.backbone.layers)):
        if without != "norm":
            module.register_forward_hook(norm)
    for block in theirs.backbone.layers:
        if without != "constants":
            block.mixer.x_proj.register_forward_hook(lambda module, given, out: out.detach())
        if without != "half":
            block.mixer.out_proj.register_forward_pre_hook(lambda module, given: given[0] / 2 + given[0].detach() / 2)
    embeds = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    logits = theirs(inputs_embeds=embeds, use_cache=False).logits
    (slope,) = torch.autograd.grad(difference(logits).sum(), embeds)
    return logits.detach(), (embeds * slope).detach()


@pytest.mark.parametrize("kind", ["no bias", "conv bias", "FalconMamba"])
def test_hf_under_the_rules_of_mambalrp(kind, monkeypatch):
    """HF computes in float32; the control leaves out one rule."""
    pytest.importorskip("transformers")
    modeling = importlib.import_module("transformers.models.mamba.modeling_mamba")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("needs transformers 5.15: before, its activations are made elsewhere")
    model = tiny(seed=4, pad_vocab_size_multiple=1, **KINDS[kind])
    found = relevance(model, IDS, difference, at.embed())[at.embed()]
    for without in (None, "silu", "norm", "constants", "half"):
        with monkeypatch.context() as patch:
            logits, theirs = hf_relevance(model.float(), IDS, patch, without)
        assert error(logits, run(model.double(), IDS).logits) < 1e-5
        off = error(theirs, found)
        assert off < 2e-5 if without is None else off > 0.2, (without, off)


# -- every backend, padding, memory, edits ----------------------------------------------------------------------------


def agree(one, two, tol=1e-10):
    near(one.values, two.values, tol)
    for place in one.records:
        near(one[place], two[place], tol)


@pytest.mark.parametrize("kind", ["every bias", "FalconMamba"])
def test_every_backend_and_its_fast_paths_alike(backend, kind):
    """Where nothing inside is asked for, the fused block and norm would serve a run; here they must not."""
    model, ids = model_of(kind), torch.randint(0, 29, (2, 63), generator=torch.Generator().manual_seed(3))
    for places in (every(), [at.embed()], [at.resid_post(layer=-1, pos=-2), at.ssm_state(layer=0, pos=[1, 5], e=3)]):
        agree(
            relevance(model, ids, linear, places, backend=backend),
            relevance(model, ids, linear, places, backend="reference"),
        )
    one = ids[:, :1]
    agree(
        relevance(model, one, linear, every(), backend=backend),
        relevance(model, one, linear, every(), backend="reference"),
    )


def test_a_padded_row_gives_what_it_gives_alone(backend):
    model = model_of("conv bias")
    places = [*every(), at.ssm_state(layer=1, pos=-2), at.u(pos=slice(-3, None))]
    found = relevance(model, IDS, difference, places, backend=backend, lengths=LENGTHS)
    for row, size in enumerate(LENGTHS):
        alone = relevance(model, IDS[row : row + 1, :size], difference, places, backend="reference")
        near(found.values[row : row + 1], alone.values, 1e-11)
        for place in places:
            lead = int(place.layer_axis)
            got = found[place].movedim(lead, 0)[row : row + 1].movedim(0, lead)
            if not isinstance(place.pos, int):
                m = alone[place].shape[lead + 1]
                got, rest = got.split([m, got.shape[lead + 1] - m], lead + 1)
                assert not rest.any()
            near(got, alone[place], 1e-10)


def test_a_carried_memory_has_its_share(backend):
    """In two pieces: what h and the window hand over in the whole run, and with it the tokens give the metric."""
    model, p = model_of("no bias"), 3
    embed, state, read, window = at.embed(), at.ssm_state(pos=p - 1), at.state_read(pos=p - 1), at.conv_state(pos=p - 1)
    whole = relevance(model, IDS, difference, [embed, state, read, window], backend="reference")
    before = run(model, IDS[:, :p], keep_state=True, backend="reference").state
    kept = [x.clone() for x in before.ssm_state]
    found = relevance(model, IDS[:, p:], difference, embed, backend=backend, state=before)
    near(found[embed], whole[embed][:, p:], 1e-10)
    near(torch.stack(found.state.ssm_state), whole[state] - whole[read], 1e-10)
    near(torch.stack(found.state.conv_state), whole[window], 1e-10)
    assert torch.equal(found.state.position, before.position)
    memory = sum(x.sum((1, 2)) for x in (*found.state.ssm_state, *found.state.conv_state))
    near(total(found, embed) + memory, found.values, 1e-11)
    assert memory.abs().min() > 1e-3
    assert all(
        torch.equal(a, b) and not b.requires_grad
        for a, b in zip(kept, map(torch.detach, before.ssm_state), strict=True)
    )


def bent(x):
    return torch.tanh(x) + 0.3


def test_under_edits(backend):
    """The same on every backend; what is put in is a source of its own, and a scaled value passes on its share."""
    model = model_of("no bias")
    state, u, gated = at.ssm_state(layer=1, pos=2), at.u(layer=0, pos=4), at.gated(layer=2, pos=-1)
    value = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edits = [
        Set(state, value), Scale(u, 1.5), Scale(gated, 0.5), Zero(at.z(layer=0, pos=1, e=[0, 3])),
        Scale(at.dt(layer=1, pos=3), 2.0), Set(at.B(layer=2, pos=-2), 0.7), Scale(at.decay(layer=2, pos=4), 0.5),
    ]  # fmt: skip
    places = [at.embed(), state, *every()]
    found = relevance(model, IDS, difference, places, edits, backend=backend)
    near(found.values, difference(run(model, IDS, edits, backend="reference").logits).detach(), 1e-11)
    put = found[state].sum((1, 2))
    near(total(found, at.embed()) + put, found.values, 1e-11)
    assert put.abs().min() > 1e-3
    more = [
        *edits,
        Add(at.resid_post(layer=0), 0.1),
        Apply(at.conv(layer=1), bent),
        Apply(at.state_read(layer=0), bent),
        Apply(at.z(layer=1), F.silu),
    ]
    for lengths in (None, LENGTHS):
        agree(*(relevance(model, IDS, difference, places, more, b, lengths=lengths) for b in (backend, "reference")))


def silu_in_place(x):
    F.silu(x, inplace=True)
    return x


FUNCTIONS = {  # in an edit -> the same with its constants held by hand
    "silu": (F.silu, lambda x: x * x.sigmoid().detach()),
    "silu in place": (silu_in_place, lambda x: x * x.sigmoid().detach()),
    "nn.SiLU in place": (torch.nn.SiLU(inplace=True), lambda x: x * x.sigmoid().detach()),
    "rms_norm": (
        lambda x: F.rms_norm(x, x.shape[-1:]),
        lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt().detach(),
    ),
    "layer_norm of two axes": (
        lambda x: F.layer_norm(x, x.shape[-2:], eps=0.1),
        lambda x: (x - x.mean((-1, -2), keepdim=True)) / (x.var((-1, -2), False, keepdim=True) + 0.1).sqrt().detach(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_rules_hold_in_the_functions_of_edits(name):
    """However they are called: in place, without weights, over several axes."""
    model, place = model_of("no bias"), at.ssm_state(layer=1, pos=3)
    plain, held = FUNCTIONS[name]
    one, two = (relevance(model, IDS, linear, [at.embed(), place], Apply(place, f), "reference") for f in (plain, held))
    agree(one, two, 1e-11)
    slope = gradients(model, IDS, linear, at.embed(), Apply(place, plain))[at.embed()]
    assert error(slope, gradients(model, IDS, linear, at.embed(), Apply(place, held))[at.embed()]) > 1e-4


def test_the_gate_shares_in_halves_what_is_its_own():
    """What an edit adds behind it is neither factor's."""
    model, place = model_of("no bias"), at.gated(layer=1)
    factors = [at.ssm_out(layer=1), at.gate(layer=1)]
    added = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = relevance(model, IDS, linear, [place, *factors], Add(place, added))
    own = found[place] * (1 - added / run(model, IDS, Add(place, added), place)[place].detach())
    for factor in factors:
        near(found[factor], own / 2, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights(dtype):
    """The values are those of a run, to the bit, and relevance errs as its numbers do."""
    exact, narrow, places = model_of("conv bias"), tiny(seed=4).to(dtype), [at.embed(), at.ssm_state(pos=3), at.x()]
    found, want = (relevance(m, IDS, difference, places, backend="torch") for m in (narrow, exact))
    assert torch.equal(found.values, difference(run(narrow, IDS, backend="torch").logits))
    for place in places:
        assert found[place].dtype == torch.float32
        assert error(found[place], want[place]) < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_nothing_stays_behind():
    """Neither after a call nor after one that failed on the way."""
    model, metric = model_of("every bias"), linear
    before = gradients(model, IDS, metric, at.embed())[at.embed()]
    relevance(model, IDS, metric, at.embed())
    with pytest.raises(ZeroDivisionError):
        relevance(model, IDS, metric, at.embed(), Apply(at.u(layer=1), lambda x: 1 / 0))
    assert torch.equal(gradients(model, IDS, metric, at.embed())[at.embed()], before)
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        state = run(model, IDS, keep_state=True).state
        inside = relevance(model, IDS, metric, at.embed(), state=state)
    agree(inside, relevance(model, IDS, metric, at.embed(), state=run(model, IDS, keep_state=True).state), 1e-12)


# -- shapes and errors ------------------------------------------------------------------------------------------------


def test_shapes_and_sums():
    model = model_of("conv bias")
    places = {
        at.ssm_state(pos=2, e=[4, 1], n=3): ((3, 3, 2), (3, 3)),
        at.u(layer=[2, 0], e=5): ((2, 3, 7), (2, 3, 7)),
        at.recurrent_state(layer=1): ((3, 7, 24, 8), (3, 7)),
        at.embed(pos=-1): ((3, 12), (3,)),
    }
    found = relevance(model, IDS, linear, [*places, *places])
    for place, (shape, summed) in places.items():
        assert found[place].shape == shape and found.summed(place).shape == summed
        near(found.summed(place), found[place].flatten(len(summed)).sum(-1) if shape != summed else found[place])
    with pytest.raises(NotRecorded, match=r"no relevance of y\(layer=1, pos=:\) was asked for"):
        found[at.y(layer=1)]


@pytest.mark.parametrize("site", CONSTANT)
def test_constants_have_none(site):
    with pytest.raises(EditError, match=f"{site} is a constant of the linear run and carries no relevance"):
        relevance(model_of("conv bias"), IDS, linear, [at.embed(), getattr(at, site)(layer=1)])


def test_what_is_refused():
    model = model_of("conv bias")
    with pytest.raises(InputError, match="wrt is empty"):
        relevance(model, IDS, linear, [])
    with pytest.raises(MetricError, match="without a gradient"):
        relevance(model, IDS, lambda logits: accuracy(logits, 3), at.embed())
    with pytest.raises(EditError, match="lets each row act on the others"):
        relevance(model, IDS, linear, at.embed(), Mean(at.u(layer=0)))
    with pytest.raises(InputError, match="give a Mamba"):
        relevance("a path", IDS, linear, at.embed())
    with pytest.raises(InputError, match=r"give run_\.state"):
        relevance(model, IDS, linear, at.embed(), state=run(model, IDS))


def test_a_function_that_the_rules_do_not_meet_is_an_error(monkeypatch):
    """A backend with a SiLU or a norm of its own would give its plain gradient."""
    model, block = model_of("conv bias"), importlib.import_module("minimal_mamba.block")
    own = type(
        "Own", (), {"silu": staticmethod(lambda x: x * x.sigmoid()), "__getattr__": lambda self, n: getattr(F, n)}
    )
    monkeypatch.setattr(block, "F", own())
    with pytest.raises(NotReached, match="met 0 SiLU and 4 norms; 3 layers have 6 and 4"):
        relevance(model, IDS, linear, at.embed())
