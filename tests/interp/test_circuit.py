"""Circuits: running one is what a plain evaluation of the graph gives; pruning drops only what changes nothing."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from helpers import slow, tiny
from plain_graph import evaluate, logits, name

from analyses.planted import MODELS, plant
from interp import Circuit, Edge, at, edge_attribution, edges, faithfulness, path_patch, prune, run
from interp.plots import circuit as circuit_plot
from minimal_mamba.errors import CheckpointError, InputError

BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])
RNG = torch.Generator().manual_seed(5)
MODEL = tiny(n_layer=2, seed=4)
IDS, DONOR = (torch.randint(0, 29, (3, 4), generator=RNG) for _ in range(2))
GRAPH = edges(MODEL.config, 4)


def metric(scores):
    return scores[:, -1, 3] - scores[:, -1, 5]


def circuit_of(chosen):
    return Circuit(tuple(chosen), (1.0,) * len(chosen), (1.0,) * len(chosen))


def drawn(seed, share):
    rng = torch.Generator().manual_seed(seed)
    return circuit_of([e for e in GRAPH if float(torch.rand((), generator=rng)) < share])


def by_hand(circuit, mean=False):
    """Node by node: an edge of the circuit brings what its sender has now, any other what it had in the donor's run."""
    kept = {(name(e.sender), name(e.receiver)) for e in circuit.edges}
    other = evaluate(MODEL, DONOR)
    if mean:
        other = {node: v.mean(0, keepdim=True).expand_as(v) for node, v in other.items()}
    return metric(logits(evaluate(MODEL, IDS, lambda s, r, v: v if (s, r) in kept else other[s])))


@BOTH
@pytest.mark.parametrize("ablate", ["donor", "mean"])
@torch.no_grad()
def test_a_circuit_s_run_is_a_plain_evaluation_of_the_graph(ablate, backend):
    several = [drawn(seed, share) for seed, share in enumerate((0.1, 0.5, 0.8, 0.95, 0.99))]
    found = faithfulness(MODEL, several, IDS, DONOR, metric, ablate=ablate, backend=backend, batch=40, progress=False)
    expected = torch.stack([by_hand(c, ablate == "mean") for c in several])
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.corrupt, by_hand(circuit_of([]), ablate == "mean"), rtol=1e-10, atol=1e-10)
    assert found.sizes == tuple(map(len, several))
    assert (expected - expected[0]).abs().max() > 0.1


@BOTH
@torch.no_grad()
def test_with_every_edge_it_is_the_model_and_with_none_the_donor(backend):
    found = faithfulness(
        MODEL, [circuit_of(GRAPH), circuit_of([])], IDS, DONOR, metric, backend=backend, progress=False
    )
    base, donor = (metric(run(MODEL, x).logits) for x in (IDS, DONOR))
    torch.testing.assert_close(found.values, torch.stack([base, donor]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.base, base, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.corrupt, donor, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.score(), torch.tensor([1.0, 0.0]).double(), rtol=1e-10, atol=1e-10)
    assert (found.error() < 1e-10).all()


@torch.no_grad()
def test_one_edge_left_out_is_path_patching():
    some = GRAPH[::17]
    without = [circuit_of([e for e in GRAPH if e != out]) for out in some]
    found = faithfulness(MODEL, without, IDS, DONOR, metric, progress=False)
    effects = path_patch(MODEL, IDS, DONOR, some, metric, progress=False)
    torch.testing.assert_close(found.values - found.base, effects.values, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_score_of_rows_with_either_sign():
    found = faithfulness(MODEL, drawn(1, 0.9), IDS, DONOR, metric, progress=False)
    sign = (found.base - found.corrupt).sign()
    expected = ((found.values[0] - found.corrupt) * sign).sum() / (found.base - found.corrupt).abs().sum()
    torch.testing.assert_close(found.score()[0], expected)
    apart = (found.values[0] - found.base).abs().sum() / (found.corrupt - found.base).abs().sum()
    torch.testing.assert_close(found.missed()[0], apart)
    swapped = faithfulness(MODEL, drawn(1, 0.9), IDS, DONOR, lambda s: -metric(s), progress=False)
    torch.testing.assert_close(swapped.score(), found.score())
    with pytest.raises(InputError, match="nothing for a circuit"):
        faithfulness(MODEL, drawn(1, 0.5), IDS, IDS, metric, progress=False).score()


@pytest.mark.parametrize("keep", [3, 20, 60, 120])
def test_pruning_drops_only_what_changes_nothing(keep):
    effects = edge_attribution(MODEL, IDS, DONOR, metric)
    best = effects.size().argsort(descending=True)[:keep]
    ranked = [effects.edges[i] for i in best.tolist()]
    circuit = prune(effects, threshold=float(effects.size()[best[-1]]))  # which may leave none
    if len(circuit):
        assert prune(effects, keep=keep) == circuit
    assert set(circuit.edges) <= set(ranked)
    found = faithfulness(MODEL, iter([circuit, circuit_of(ranked)]), IDS, DONOR, metric, progress=False)
    torch.testing.assert_close(found.values[0], found.values[1], rtol=1e-10, atol=1e-10)
    for edge in circuit.edges:  # each lies on a way from an embedding to logits
        assert edge.sender.site == "embed" or any(e.receiver == edge.sender for e in circuit.edges)
        assert edge.receiver.site == "logits" or any(e.sender == edge.receiver for e in circuit.edges)
    dropped = set(ranked) - set(circuit.edges)
    assert dropped if keep < 60 else True


def test_pruning_by_size_keeps_what_is_above_and_never_what_does_nothing():
    effects = edge_attribution(MODEL, IDS, DONOR, metric)
    everything = prune(effects, threshold=0.0)
    assert all(effects[e].abs().max() > 0 for e in everything.edges) and len(everything) < len(GRAPH)
    assert not any(e.receiver == at.logits(pos=1) for e in everything.edges)
    some = prune(effects, threshold=0.1)
    assert 0 < len(some) < len(everything) and all(effects[e].abs().mean() >= 0.1 for e in some.edges)
    signs = (effects.donor - effects.base).sign()
    for edge, size, towards in zip(some.edges, some.sizes, some.towards, strict=True):
        assert size == pytest.approx(float(effects[edge].abs().mean()))
        assert towards == pytest.approx(float((effects[edge] * signs).mean()))
    full = faithfulness(MODEL, everything, IDS, DONOR, metric, progress=False)
    torch.testing.assert_close(full.score(), torch.ones(1).double())


def test_a_number_of_edges_of_which_none_makes_a_way_says_how_many_do():
    """The circuit was empty, without a word."""
    effects = edge_attribution(MODEL, IDS, DONOR, metric)
    with pytest.raises(InputError, match=r"keep=1: of the 1 edges .* give keep=(\d+) or more, .* or keep=0") as told:
        prune(effects, keep=1)
    least = int(re.findall(r"keep=(\d+)", str(told.value))[1])
    assert len(prune(effects, keep=least)) > 0 == len(prune(effects, keep=0))
    with pytest.raises(InputError, match=f"give keep={least} or more"):
        prune(effects, keep=least - 1)
    two = plant("two", 0)
    there, back = (
        edge_attribution(two.model, *x, two.metric) for x in ((two.ids, two.donor_ids), (two.donor_ids, two.ids))
    )
    broken = replace(there, values=there.values * (there.size() > 1e-9)[:, None])
    with pytest.raises(InputError, match=r"nor does any of all 10 that have an effect\. Give the effects of the other"):
        prune(broken, keep=50)
    assert len(prune(broken, back, keep=50)) > 0
    nothing = replace(effects, values=torch.zeros_like(effects.values))
    with pytest.raises(InputError, match=r"keep=9: of the 0 edges .* if these are two prompts that the metric tells"):
        prune(nothing, keep=9)


@torch.no_grad()
def test_edges_that_were_not_scored_count_as_kept():
    """With the residual's edges alone, the insides of the layers are live: the way goes on through them."""
    stream = edges(MODEL.config, 4, receivers=["x", "gate", "logits"])
    effects = path_patch(MODEL, IDS, DONOR, stream, metric, progress=False)
    circuit = prune(effects, keep=len(stream))
    assert len(circuit) > 20
    found = faithfulness(MODEL, [circuit, circuit_of([])], IDS, DONOR, metric, graph=stream, progress=False)
    torch.testing.assert_close(found.score(), torch.tensor([1.0, 0.0]).double(), rtol=1e-9, atol=1e-9)
    few = prune(effects, keep=12)
    inside = circuit_of([*few.edges, *(e for e in GRAPH if e not in set(stream))])
    found = faithfulness(MODEL, few, IDS, DONOR, metric, graph=stream, progress=False)
    torch.testing.assert_close(found.values[0], by_hand(inside), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_padded_row_scores_as_it_does_alone():
    lengths, circuit = [4, 2, 3], drawn(7, 0.9)

    def last(scores):
        return scores[:, -1, 3] - scores[:, -1, 5]

    for graph in (None, edges(MODEL.config, 4, positions=[0, 1])):
        inside = circuit_of([e for e in circuit.edges if graph is None or e in graph])
        found = faithfulness(MODEL, inside, IDS, DONOR, last, lengths=lengths, graph=graph, progress=False)
        for i, n in enumerate(lengths):
            own = circuit_of([e for e in inside.edges if e.receiver.pos < n])
            short = [e for e in graph or edges(MODEL.config, n) if e.receiver.pos < n]
            alone = faithfulness(
                MODEL, own, IDS[i : i + 1, :n], DONOR[i : i + 1, :n], last, graph=short, progress=False
            )
            torch.testing.assert_close(found.values[0, i], alone.values[0, 0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.corrupt[i], alone.corrupt[0], rtol=1e-10, atol=1e-10)


def test_a_circuit_is_a_value_and_comes_back_from_disk(tmp_path):
    circuit = prune(edge_attribution(MODEL, IDS, DONOR, metric), keep=40)
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert again == circuit and hash(again) == hash(circuit) and str(again) == str(circuit)
    assert str(circuit).startswith(f"Circuit of {len(circuit)} edges between {len(circuit.nodes)} nodes; size")
    shuffled = Circuit(circuit.edges[::-1], circuit.sizes[::-1], circuit.towards[::-1])
    assert shuffled == circuit
    (tmp_path / "circuit.json").write_text('{"version": 99}')
    for file in ("circuit.json", "none.json"):
        with pytest.raises(CheckpointError, match="holds no circuit"):
            Circuit.load(tmp_path / file)


def test_bad_input_says_what_to_do():
    effects = edge_attribution(MODEL, IDS, DONOR, metric)
    with pytest.raises(InputError, match="either keep="):
        prune(effects)
    with pytest.raises(InputError, match="keep=-1"):
        prune(effects, keep=-1)
    with pytest.raises(InputError, match="single edges"):
        prune(path_patch(MODEL, IDS, DONOR, [GRAPH[:2]], metric, progress=False), keep=1)
    with pytest.raises(InputError, match="each edge once"):
        Circuit((GRAPH[0], GRAPH[0]), (1.0, 1.0), (1.0, 1.0))
    with pytest.raises(InputError, match="ablate='zero'"):
        faithfulness(MODEL, circuit_of([]), IDS, DONOR, metric, ablate="zero")
    with pytest.raises(InputError, match="no edge of the graph"):
        faithfulness(MODEL, circuit_of(GRAPH), IDS, DONOR, metric, graph=GRAPH[:9])
    assert Edge(at.embed(pos=0), at.x(layer=0, pos=0)) in GRAPH


def test_a_drawing_has_an_arrow_an_edge_as_wide_as_its_effect():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_hex
    from matplotlib.patches import FancyArrowPatch

    found = prune(edge_attribution(MODEL, IDS, DONOR, metric), keep=60)
    ax = circuit_plot(found, tokens=list("abcd"), unit="nats", title="drawn")
    ax.figure.canvas.draw()
    arrows = [p for p in ax.patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == len(found) > 5
    top = max(found.sizes)
    for arrow, size, towards in zip(arrows, found.sizes, found.towards, strict=True):
        assert arrow.get_linewidth() == pytest.approx(max(0.4, 2.2 * size / top))
        colour = "#737373" if abs(towards) < size / 2 else "#0072b2" if towards > 0 else "#d55e00"
        assert to_hex(arrow.get_edgecolor()) == colour
    columns = sorted({n.pos for n in found.nodes})
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{'abcd'[t]}\n{t}" for t in columns]
    assert len({(a.get_xdata()[0], a.get_ydata()[0]) for a in ax.lines}) == len(found.nodes)  # no two in one place
    plt.close(ax.figure)
    with pytest.raises(InputError, match="no edges"):
        circuit_plot(circuit_of([]))
    with pytest.raises(InputError, match="labels"):
        circuit_plot(found, tokens=["a"])


@pytest.mark.parametrize("tokens", [None, list("abcd"), ["$$ incomprehensible"] * 4])
def test_each_drawing_has_its_own_legend_that_can_be_read(tokens):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.text import Text

    found = prune(edge_attribution(MODEL, IDS, DONOR, metric), keep=60)
    figure, both = plt.subplots(1, 2, figsize=(6.8, 5), constrained_layout=True)
    for ax in both:
        circuit_plot(found, ax=ax, tokens=tokens)
    figure.canvas.draw()
    for ax, (low, high) in zip(both, ((0.0, 0.5), (0.5, 1.0)), strict=True):
        legend, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
        assert legend.y0 >= 0 and legend.y1 <= label.y0
        assert low * figure.bbox.x1 <= legend.x0 and legend.x1 <= high * figure.bbox.x1
        names = sorted((name.get_window_extent() for name in ax.get_xticklabels()), key=lambda box: box.x0)
        assert all(one.x1 <= other.x0 for one, other in itertools.pairwise(names))
        assert all(name.y0 >= label.y1 - 1 for name in names)
    assert not figure.legends
    assert min(text.get_size() for text in figure.findobj(Text) if text.get_text()) >= 6.5
    plt.close(figure)


# -- models whose circuits are known ---------------------------------------------------------------------------------

PLANTED = [case for name in MODELS for case in ((name, 0), *slow((name, 1)))]


def closed(edge):
    """Whether the truth gives an edge's effect in closed form; of the others it says where they may be."""
    into = {"x", "gate", "ssm_state", "y", "skip", "mixer_out", "logits"}
    return edge.receiver.site in into and edge.sender.site != "decay"


def known(p):
    """{edge: (b,)} of the planted edges that are `closed`; all other such edges do nothing."""
    truth, end = p.truth, p.ids.shape[1] - 1
    moves = {(site, i, t): v for site, cells in truth.effects.items()
             for i, row in enumerate(cells) for t, v in enumerate(row) if v.abs().max() > 1e-9}  # fmt: skip
    found = {}
    if p.name == "delay":
        (first, a), (second, b) = ((i, t) for site, i, t in sorted(moves) if site == "mixer_out")
        source = next(t for site, i, t in moves if site == "x" and i == first)
        steps = [Edge(at.embed(pos=source), at.x(layer=first, pos=source)),
                 Edge(at.mixer_out(layer=first, pos=a), at.x(layer=second, pos=a)),
                 Edge(at.mixer_out(layer=second, pos=b), at.logits(pos=b))]  # fmt: skip
        steps += [Edge(at.skip(layer=i, pos=t), at.mixer_out(layer=i, pos=t)) for i, t in ((first, a), (second, b))]
        steps += [Edge(at.u(layer=i, pos=t), at.skip(layer=i, pos=t)) for i, t in ((first, a), (second, b))]
        return dict.fromkeys(steps, p.gap)
    for (site, i, t), value in moves.items():
        if site == "x":
            found[Edge(at.embed(pos=t), at.x(layer=i, pos=t))] = value
        if site == "state_write":
            found[Edge(at.state_write(layer=i, pos=t), at.ssm_state(layer=i, pos=t))] = value
        if site == "ssm_state" and t < end:
            found[Edge(at.ssm_state(layer=i, pos=t), at.ssm_state(layer=i, pos=t + 1))] = value
        if site == "state_read":
            found[Edge(at.ssm_state(layer=i, pos=t), at.y(layer=i, pos=t))] = value
        if site == "mixer_out":
            found[Edge(at.mixer_out(layer=i, pos=t), at.logits(pos=t))] = value
            found[Edge(at.y(layer=i, pos=t), at.mixer_out(layer=i, pos=t))] = value
    return found


@pytest.mark.parametrize(("name", "seed"), PLANTED)
def test_the_planted_edges_are_found_and_nothing_else(name, seed):
    p = plant(name, seed)
    graph, truth = edges(p.model.config, p.ids.shape[1]), known(p)
    least = 1e-6 * float(p.gap.abs().mean())
    both = [edge_attribution(p.model, *ids, p.metric) for ids in ((p.ids, p.donor_ids), (p.donor_ids, p.ids))]
    some = list(dict.fromkeys([*truth, *prune(*both, threshold=least).edges, *graph[seed::9]]))
    exact = path_patch(p.model, p.ids, p.donor_ids, some, p.metric, progress=False)
    last = max(e.receiver.layer for e in truth if e.receiver.layer is not None)
    touched = {
        t for site in ("u", "mixer_out") for t in p.truth.effects[site].abs().amax((0, 2)).nonzero()[:, 0].tolist()
    }
    for effects in (exact, both[0]):
        for edge, value in zip(effects.edges, effects.values, strict=True):
            bent = edge.receiver.site == "x" or edge.receiver.layer not in (None, last)  # a SiLU comes after it
            if edge in truth and not (effects is both[0] and bent):
                torch.testing.assert_close(value, truth[edge], rtol=1e-8, atol=1e-8)
            elif closed(edge):
                assert edge in truth or value.abs().max() < 1e-9
            elif edge.receiver.pos not in touched or (name != "delay" and edge.receiver.layer != p.truth.layer):
                assert value.abs().max() < 1e-9


@pytest.mark.parametrize(("name", "seed"), PLANTED)
def test_the_circuit_that_is_pruned_is_the_planted_one_and_carries_everything(name, seed):
    p = plant(name, seed)
    least = 1e-6 * float(p.gap.abs().mean())
    there, back = (edge_attribution(p.model, *ids, p.metric) for ids in ((p.ids, p.donor_ids), (p.donor_ids, p.ids)))
    circuit = prune(there, back, threshold=least)
    assert {e for e in circuit.edges if closed(e)} == set(known(p))
    ways = ((p.ids, p.donor_ids), (p.donor_ids, p.ids))
    for ids in ways:
        found = faithfulness(p.model, circuit, *ids, p.metric, progress=False)
        torch.testing.assert_close(found.score(), torch.ones(1).double(), rtol=1e-9, atol=1e-9)
        assert found.missed() < 1e-9
    # no edge is there for nothing: without it a row parts from the model, in one direction at least
    less = [circuit_of([e for e in circuit.edges if e != out]) for out in circuit.edges]
    lost = [faithfulness(p.model, less, *ids, p.metric, progress=False).missed() for ids in ways]
    assert torch.stack(lost).amax(0).min() > 0.01


def test_two_factors_that_change_together_show_in_the_other_direction_only():
    """In `two` a tick is at once u and, by B, the direction: beside a zero of the other, neither moves anything."""
    p = plant("two", 0)
    there, back = (edge_attribution(p.model, *ids, p.metric) for ids in ((p.ids, p.donor_ids), (p.donor_ids, p.ids)))
    sites = [at.u(layer=p.truth.layer, pos=t) for t in range(12)], [at.B(layer=p.truth.layer, pos=t) for t in range(12)]
    factors = [e for e in there.edges if e.receiver.site == "state_write" and e.sender in (*sites[0], *sites[1])]
    assert max(float(there[e].abs().max()) for e in factors) < 1e-9
    assert sum(float(back[e].abs().min()) > 0.5 for e in factors) == 2
    assert len(prune(there, threshold=1e-6)) == 0
    assert len(prune(back, threshold=1e-6)) == len(prune(there, back, threshold=1e-6)) > 8
