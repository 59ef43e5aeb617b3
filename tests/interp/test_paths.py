"""Path patching and edge attribution, against two runs made by hand in plain PyTorch and finite differences."""

import pytest
import torch
from helpers import tiny
from plain_graph import evaluate, formula, logits, name, nodes, senders

from interp import Edge, Set, at, edge_attribution, edges, kl, logit_diff, path_patch, run
from interp.circuits import paths, views
from interp.run import MetricError
from kernels_bridge import torch_ops
from minimal_mamba.errors import AddressError, EditError, InputError, MambascopeError, NotReached
from minimal_mamba.scan import READABLE, Ops, selective_scan

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
SHAPES = {
    "plain": {},
    "wide conv": {"d_conv": 7},
    "no conv": {"d_conv": 1},
    "FalconMamba": {"mixer_rms_eps": 0.3},
    "LayerNorm, biases, one state": {"rms_norm": False, "bias": True, "d_state": 1},
}


def case(l=5, b=2, seed=3, **overrides):
    model = tiny(**{"n_layer": 2, "seed": seed} | overrides)
    rng = torch.Generator().manual_seed(seed)
    ids, donor = (torch.randint(0, 29, (b, l), generator=rng) for _ in range(2))
    return model, ids, donor


def metric(scores):
    return scores[:, -1, 3] - scores[:, -1, 5] + scores[:, 0, 7]


def two_runs(model, ids, donor_ids, pairs, part=1.0):
    """The metric's change where a receiver is computed with one sender's value exchanged, wholly or in part."""
    base, donor = evaluate(model, ids), evaluate(model, donor_ids)
    found = []
    for sender, receiver in pairs:
        got = {s: base[s] for s in senders(model.config, receiver)}
        got[sender] = (1 - part) * base[sender] + part * donor[sender]  # the first run: what the receiver becomes
        second = evaluate(model, ids, fixed={receiver: formula(model, receiver, got)})
        found.append(metric(logits(second)) - metric(logits(base)))
    return torch.stack(found)


def pairs_of(found):
    return [(name(e.sender), name(e.receiver)) for e in found]


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_an_edge_s_effect_is_the_difference_of_two_runs_made_by_hand(shape, backend):
    model, ids, donor = case(**SHAPES[shape])
    found = edges(model.config, 5)
    effects = path_patch(model, ids, donor, found, metric, backend=backend, batch=170, progress=False)
    by_hand = two_runs(model, ids, donor, pairs_of(found))
    torch.testing.assert_close(effects.values, by_hand, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(effects.base, metric(logits(evaluate(model, ids))), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(effects.donor, metric(logits(evaluate(model, donor))), rtol=1e-10, atol=1e-10)
    kinds = {e.group[::2] for e, size in zip(found, effects.size(), strict=True) if size > 1e-4}
    assert len(kinds) > 20 + model.config.d_conv - 3  # every kind of edge moves the metric somewhere


@pytest.mark.parametrize("l", [1, 2, 7])
@torch.no_grad()
def test_the_graph_is_complete_and_every_length_works(l):
    model, ids, donor = case(l=l)
    found = edges(model.config, l)
    assert set(pairs_of(found)) == {(s, r) for r in nodes(model.config, l) for s in senders(model.config, r)}
    some = found[:: max(1, len(found) // 40)]
    effects = path_patch(model, ids, donor, some, metric, progress=False)
    torch.testing.assert_close(effects.values, two_runs(model, ids, donor, pairs_of(some)), rtol=1e-10, atol=1e-10)


@BOTH
@torch.no_grad()
def test_it_is_the_difference_of_two_runs_under_edits(backend):
    """The same with edits alone: one run makes the receiver's value, a second one puts it into the base run."""
    model, ids, donor = case(l=4)
    found = [e for e in edges(model.config, 4, positions=[0, 3]) if e.receiver.site != "logits"]
    effects = path_patch(model, ids, donor, found, metric, backend=backend, progress=False)
    every = list({n for e in found for n in (e.sender, e.receiver)} | {at.resid_pre(layer=i, pos=3) for i in (0, 1)}
                 | {at.resid_pre(layer=i, pos=0) for i in (0, 1)})  # fmt: skip
    base, other = (run(model, x, record=every, backend=backend) for x in (ids, donor))
    for edge in found:
        s, r = edge.sender, edge.receiver
        if r.site in ("x", "gate"):
            stream = at.resid_pre(layer=r.layer, pos=r.pos)
            first = [Set(stream, base[stream] + other[s] - base[s])]
        else:
            inputs = [e.sender for e in found if e.receiver == r]
            first = [Set(n, other[n] if n == s else base[n]) for n in inputs]
        value = run(model, ids, first, record=[r], backend=backend)[r]
        by_hand = metric(run(model, ids, [Set(r, value)], backend=backend).logits) - effects.base
        torch.testing.assert_close(effects[edge], by_hand, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_edges_in_a_tuple_are_patched_at_once():
    model, ids, donor = case()
    x, gate, tap = (Edge(at.mixer_out(layer=0, pos=3), at.x(layer=1, pos=3)),
                    Edge(at.mixer_out(layer=0, pos=3), at.gate(layer=1, pos=3)),
                    Edge(at.x(layer=0, pos=2), at.u(layer=0, pos=4)))  # fmt: skip
    effects = path_patch(model, ids, donor, [(x, gate, tap), x], metric, progress=False)
    other, chosen = evaluate(model, donor), set(pairs_of([x, gate, tap]))
    together = evaluate(model, ids, lambda s, r, v: other[s] if (s, r) in chosen else v)
    by_hand = metric(logits(together)) - effects.base
    torch.testing.assert_close(effects[(x, gate, tap)], by_hand, rtol=1e-10, atol=1e-10)
    assert (effects[(x, gate, tap)] - effects[x]).abs().min() > 1e-3


@BOTH
def test_attribution_is_the_derivative_of_path_patching(backend):
    model, ids, donor = case()
    effects = edge_attribution(model, ids, donor, metric, backend=backend)
    found, h = list(effects.edges), 1e-5
    with torch.no_grad():
        ahead, behind = (two_runs(model, ids, donor, pairs_of(found), part=p) for p in (h, -h))
    torch.testing.assert_close(effects.values, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)
    assert (effects.size() > 1e-4).sum() > 100


def test_effects_are_numbers_whatever_a_metric_holds():
    """A metric that compares with a run of its own has a gradient in the weights, which no result keeps."""
    model, ids, donor = case()
    other = run(model, donor)
    assert other.logits.requires_grad
    found = edge_attribution(model, ids, donor, lambda scores: kl(scores, other.last_logits))
    assert not any(values.requires_grad for values in (found.values, found.base, found.donor))
    assert found.donor.abs().max() < 1e-12 and (found.base > 0).all()


@BOTH
def test_attribution_is_exact_where_all_that_follows_is_linear(backend):
    """With a huge epsilon a norm is a constant factor: below the last layer's SiLUs and products nothing bends."""
    model, ids, donor = case(norm_eps=1e16)
    with torch.no_grad():
        for module in (model.backbone.norm_f, *(layer.norm for layer in model.backbone.layers)):
            module.weight.mul_(1e8)
    receivers = ["state_write", "ssm_state", "y", "mixer_out", "logits", "decay"]
    senders_ = ["u", "B", "C", "state_write", "decay", "ssm_state", "y", "skip", "gate", "embed", "mixer_out"]
    found = edges(model.config, 5, layers=[1], receivers=receivers, senders=senders_)
    found += edges(model.config, 5, receivers=["logits"])
    exact = path_patch(model, ids, donor, found, metric, backend=backend, progress=False)
    first = edge_attribution(model, ids, donor, metric, found, backend=backend)
    torch.testing.assert_close(first.values, exact.values, rtol=1e-9, atol=1e-11)
    assert len(found) > 60 and (exact.size() > 1e-4).sum() > 30
    bent = edges(model.config, 5, layers=[1], receivers=["dt"])
    exact = path_patch(model, ids, donor, bent, metric, backend=backend, progress=False)
    first = edge_attribution(model, ids, donor, metric, bent, backend=backend)
    assert (first.values - exact.values).abs().max() > 1e-4


def test_integrated_gradients_sum_to_the_whole_difference():
    model, ids, donor = case()
    few, many = (edge_attribution(model, ids, donor, metric, steps=n) for n in (20, 100))
    gap = few.donor - few.base
    left = [(e.values.sum(0) - gap).abs().max() for e in (few, many)]
    assert left[1] < 0.02 * gap.abs().max() and left[1] < left[0] / 8
    one = edge_attribution(model, ids, donor, metric)
    assert (one.values.sum(0) - gap).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@torch.no_grad()
def test_the_donor_s_metric_is_each_row_s_own_whatever_integers_the_lengths_are(dtype):
    """uint8 indexes as a mask would, which goes unseen where there are as many rows as positions."""
    model, ids, donor = case(l=4, b=4)
    lengths, last = torch.tensor([4, 2, 3, 4], dtype=dtype), lambda x: logit_diff(x, 3, 5)
    want = torch.cat([last(run(model, donor[i : i + 1, :n]).logits) for i, n in enumerate(lengths.tolist())])
    few = edges(model.config, 2)[-2:]
    for found in (
        path_patch(model, ids, donor, few, last, lengths=lengths, progress=False),
        edge_attribution(model, ids, donor, last, edges=few, lengths=lengths),
    ):
        torch.testing.assert_close(found.donor, want, rtol=1e-10, atol=1e-10)


@BOTH
def test_a_padded_row_has_the_effects_that_it_has_alone(backend):
    model, ids, donor = case(l=6, b=3)
    lengths = [6, 3, 5]

    def last(scores):
        return logit_diff(scores, 3, 5)

    found = edges(model.config, 6)
    for method in (
        lambda *a, **k: path_patch(*a[:3], k.pop("edges"), a[3], progress=False, **k),
        edge_attribution,
    ):
        effects = method(model, ids, donor, last, edges=found, lengths=lengths, backend=backend)
        assert effects.values.isfinite().all()
        for i, n in enumerate(lengths):
            own = [e for e in found if e.receiver.pos < n]
            alone = method(model, ids[i : i + 1, :n], donor[i : i + 1, :n], last, edges=own, backend=backend)
            mine = torch.tensor([e.receiver.pos < n for e in found])
            torch.testing.assert_close(effects.values[mine, i], alone.values[:, 0], rtol=1e-9, atol=1e-11)
            assert not effects.values[~mine, i].abs().max() > 1e-12 if n < 6 else True
            torch.testing.assert_close(effects.donor[i], alone.donor[0], rtol=1e-9, atol=1e-11)


def test_a_choice_of_edges_gives_what_all_give_and_touches_the_scan_only_there(monkeypatch):
    model, ids, donor = case(l=9)
    steps = []
    original = torch_ops.ssm_step
    monkeypatch.setattr(torch_ops, "ssm_step", lambda *a, **k: (steps.append(k["t"]), original(*a, **k))[1])
    whole = edge_attribution(model, ids, donor, metric, backend="torch")
    steps.clear()
    few = edges(model.config, 9, positions=[4], layers=[1])
    some = edge_attribution(model, ids, donor, metric, few, backend="torch")
    assert set(steps) == {3, 4}
    for edge in few:
        torch.testing.assert_close(some[edge], whole[edge], rtol=1e-9, atol=1e-12)
    steps.clear()
    along = edges(model.config, 9, receivers=["x", "gate", "u", "B", "C", "dt", "skip", "mixer_out", "logits"])
    path_patch(model, ids, donor, along, metric, backend="torch", progress=False)
    assert not steps


@torch.no_grad()
def test_float32_and_how_many_rows_at_once():
    model, ids, donor = case()
    found = edges(model.config, 5)
    exact = path_patch(model, ids, donor, found, metric, progress=False)
    for rows in (1, 37, 10_000):
        again = path_patch(model, ids, donor, found, metric, batch=rows, progress=False)
        torch.testing.assert_close(again.values, exact.values, rtol=1e-10, atol=1e-12)
    single = path_patch(model.float(), ids, donor, found, metric, progress=False)
    torch.testing.assert_close(single.values, exact.values.float(), rtol=1e-3, atol=1e-4)
    first = edge_attribution(model, ids, donor, metric)
    assert first.values.dtype == torch.float32 and first.values.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"steps": 2, "lengths": [2, 2, 1, 2]}])
def test_attribution_goes_back_through_as_many_rows_as_its_memory_holds(monkeypatch, options):
    """Counted by what a pass saves for its backward: all edges of 24 layers, 16 tokens, 8 rows took 16 GB, now 5."""
    model, ids, donor = case(l=2, b=4, n_layer=1, d_state=16)
    answers, real, saved = torch.tensor([3, 5, 7, 2]), paths.send, []

    def metric(scores):
        return scores[:, -1].gather(1, answers[:, None])[:, 0] * scores[:, 0, 7]  # each row has its own answer

    def counted(model, ids, *args):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.setdefault(id(x), x), lambda x: x):
            made = real(model, ids, *args)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held.values()}
        saved.append((len(ids), sum(size for at, size in storages.items() if at not in weights)))
        return made

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    monkeypatch.setattr(paths, "send", counted)
    whole = edge_attribution(model, ids, donor, metric, **options)
    assert {n for n, _ in saved} == {4}
    all_rows = max(size for _, size in saved)
    saved.clear()
    monkeypatch.setattr(paths, "MEMORY", all_rows // 2, raising=False)
    some = edge_attribution(model, ids, donor, metric, **options)
    torch.testing.assert_close(some.values, whole.values, rtol=1e-10, atol=1e-12)
    assert 0 < max(size for _, size in saved) < all_rows / 2


def test_what_an_edge_is():
    edge = Edge(at.x(layer=0, pos=3), at.u(layer=0, pos=4))
    assert str(edge) == "x(layer=0, pos=3) -> u(layer=0, pos=4)" and edge == Edge(edge.sender, edge.receiver)
    wrong = [
        (at.u(layer=0, pos=3), at.x(layer=0, pos=3)),  # backwards
        (at.u(layer=0, pos=3), at.B(layer=1, pos=3)),  # another layer
        (at.mixer_out(layer=1, pos=3), at.x(layer=1, pos=3)),
        (at.embed(pos=2), at.x(layer=1, pos=3)),
        (at.x(layer=0, pos=4), at.u(layer=0, pos=3)),  # the future
        (at.ssm_state(layer=0, pos=1), at.ssm_state(layer=0, pos=3)),
        (at.ssm_state(layer=0, pos=1), at.y(layer=0, pos=2)),
        (at.state_write(layer=0, pos=1), at.ssm_state(layer=0, pos=2)),
        (at.embed(pos=-1), at.x(layer=1, pos=-1)),
        (at.embed(), at.x()),
        (at.y(layer=0, pos=1, e=3), at.mixer_out(layer=0, pos=1)),
        (at.conv(layer=0, pos=1), at.u(layer=0, pos=1)),
        ("embed", at.x(layer=0, pos=0)),
    ]
    for sender, receiver in wrong:
        with pytest.raises(EditError) as error:
            Edge(sender, receiver)
        assert isinstance(error.value, MambascopeError)


def test_bad_input_says_what_to_do():
    model, ids, donor = case()
    far = [Edge(at.embed(pos=7), at.x(layer=0, pos=7)), Edge(at.embed(pos=0), at.x(layer=2, pos=0)),
           Edge(at.x(layer=0, pos=0), at.u(layer=0, pos=3))]  # fmt: skip
    for edge in far:
        with pytest.raises(AddressError, match="does not exist here"):
            path_patch(model, ids, donor, [edge], metric, progress=False)
    with pytest.raises(InputError, match="differ in shape"):
        path_patch(model, ids, donor[:, 1:], far[:1], metric, progress=False)
    with pytest.raises(EditError, match="is no edge"):
        edge_attribution(model, ids, donor, metric, [at.x(layer=0, pos=0)])
    with pytest.raises(MetricError, match="without a gradient"):
        edge_attribution(model, ids, donor, lambda s: s[:, -1].argmax(-1).double())
    with pytest.raises(InputError, match="steps=0"):
        edge_attribution(model, ids, donor, metric, steps=0)
    with pytest.raises(InputError, match="no node"):
        edges(model.config, 5, receivers=["conv"])
    effects = edge_attribution(model, ids, donor, metric, edges(model.config, 5, positions=[1]))
    with pytest.raises(InputError, match="none of the"):
        effects[Edge(at.embed(pos=0), at.x(layer=0, pos=0))]
    assert effects.top(3)[0][1] == pytest.approx(effects.towards().gather(0, effects.size().argmax()[None]).item())


def test_operations_that_pass_over_a_site_are_an_error(monkeypatch):
    def deaf(*args, tap, **kwargs):
        return selective_scan(*args, **kwargs)

    monkeypatch.setattr(views, "resolve", lambda *a: Ops("deaf", READABLE.conv, deaf))
    model, ids, donor = case()
    with pytest.raises(NotReached, match="passed over"):
        path_patch(model, ids, donor, edges(model.config, 5, receivers=["ssm_state"]), metric, progress=False)
