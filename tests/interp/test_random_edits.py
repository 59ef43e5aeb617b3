"""Edits that nobody chose: the two backends, one pass and its pieces, agree under whatever hypothesis draws."""

import dataclasses
import random

import pytest
import torch
from helpers import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp import Add, Apply, Mean, Project, Scale, Set, Zero, at, run
from kernels_bridge import resolve
from minimal_mamba import Plan
from minimal_mamba.edits import KINDS
from minimal_mamba.sites import ADDRESSABLE

MODEL = tiny(seed=5)
CONFIG = MODEL.config
SETTINGS = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None
)


def bent(x):
    return torch.tanh(x) * 1.1 + 0.1


def selection(r, size):
    """None (all), an int, a list or a slice of an axis."""
    kind = r.choice(["all", "all", "int", "negative", "list", "slice"])
    if kind == "all":
        return slice(None)
    if kind == "int":
        return r.randint(0, size - 1)
    if kind == "negative":
        return -r.randint(1, size)
    if kind == "list":
        return r.sample(range(size), r.randint(1, min(4, size)))
    start = r.randint(0, size - 1)
    return slice(start, r.randint(start + 1, size), r.randint(1, 3))


def address(r, first, shortest, site=None):
    """An address that every row of the batch has; positions from `first`, rows at least `shortest` long."""
    site = site or r.choice(list(ADDRESSABLE))
    spec = ADDRESSABLE[site]
    fields = {}
    pos = selection(r, shortest)
    if first:  # positions count on
        pos = pos if isinstance(pos, slice) and pos == slice(None) else _shift(pos, first)
    fields["pos"] = pos
    if spec.layered:
        fields["layer"] = selection(r, CONFIG.n_layer)
    for axis in spec.features:
        if axis != "n+k":
            fields[axis] = selection(r, CONFIG.size(axis))
    return getattr(at, site)(**fields)


def _shift(pos, first):
    if isinstance(pos, slice):
        return slice(pos.start + first, pos.stop + first, pos.step)
    if isinstance(pos, int):
        return pos if pos < 0 else pos + first
    return [p + first for p in pos]


def scene_of(seed, padded=None, carried=None, site=None):
    """A batch, what it carries, and some edits and recordings of it; the first edit is of `site`.

    Drawn from a seed: hypothesis' own draws are far from even, and left whole sites out.
    """
    r = random.Random(f"{seed} {site}")
    b, l = r.randint(1, 3), r.choice([1, 2, 5, 9])
    rng = torch.Generator().manual_seed(r.randint(0, 999))
    ids = torch.randint(0, CONFIG.vocab_size, (b, l), generator=rng)
    padded = (r.random() < 0.5) if padded is None else padded
    lengths = [r.randint(1, l) for _ in range(b)] if padded else None
    first = r.choice([0, 3]) if carried is None else 3 * carried
    before = torch.randint(0, CONFIG.vocab_size, (b, first), generator=rng) if first else None
    shortest = min(lengths or [l])
    zero = torch.zeros(b, dtype=torch.long) + first
    sizes = torch.tensor(lengths or [l] * b)
    edits = []
    for _ in range(r.randint(1, 4)):
        place = address(r, first, shortest, None if edits else site)
        kinds = ["Set", "Add", "Scale", "Zero", "MeanGiven"] + (["Mean"] if b > 1 else [])
        if place.site != "recurrent_state":
            kinds.append("Apply")
            if not all(isinstance(f, int) for f in place.features):
                kinds.append("Project")
        kind = r.choice(kinds)
        if kind == "Mean" and lengths and ADDRESSABLE[place.site].axes.count("l") == 0 and ends_matter(place):
            kind = "Zero"
        rows = r.sample(range(b), r.randint(1, b)) if r.random() < 0.4 else None
        shape = list(Plan(CONFIG, [bare := Zero(place, rows=rows)], [], zero, zero + sizes).shape(bare))
        tail = shape[len(shape) - sum(not isinstance(f, int) for f in place.features) :]
        form = r.choice(["full", "full", "ones", "tail", "number"])
        size = {"full": shape, "ones": [1 if (r.random() < 0.5) else s for s in shape], "tail": tail, "number": []}[
            form
        ]
        if place.site == "recurrent_state" and size:
            size[-1] = CONFIG.size("n+k")
        value = 0.5 * torch.randn(size, generator=rng, dtype=torch.float64)
        if place.site in ("dt", "decay"):
            value = value.abs()  # a step size or a decay below zero makes states explode, and rounding with them
        basis = torch.randn([1, *tail], generator=rng, dtype=torch.float64)
        edits.append(make(kind, place, value, basis, r.random() < 0.5, rows))
    record = [address(r, first, shortest) for _ in range(r.randint(0, 3))]
    return ids, lengths, before, edits, record


def make(kind, place, value, basis, keep, rows):
    """An edit of this kind."""
    if kind == "Project":
        return Project(place, basis, keep=keep, rows=rows)
    if kind == "Apply":
        return Apply(place, bent, rows=rows)
    if kind == "MeanGiven":
        return Mean(place, value, rows=rows)
    if kind in ("Zero", "Mean"):
        return {"Zero": Zero, "Mean": Mean}[kind](place, rows=rows)
    return {"Set": Set, "Add": Add, "Scale": Scale}[kind](place, value, rows=rows)


def ends_matter(place):
    """Whether rows of different lengths may have this position at different times (DESIGN: Mean then raises)."""
    pos = place.pos
    return (isinstance(pos, int) and pos < 0) or (isinstance(pos, tuple) and min(pos) < 0)


def everything(scene, backend):
    """Logits, recordings, final state, and the gradients of all parameters and edit values, by name."""
    ids, lengths, before, edits, record = scene
    leaves = [None if e.value is None else e.value.detach().clone().requires_grad_() for e in edits]
    edits = [e if v is None else remade(e, v) for e, v in zip(edits, leaves, strict=True)]
    state = None if before is None else run(MODEL, before, backend=backend, keep_state=True).state
    out = run(MODEL, ids, edits, record, backend, state=state, lengths=lengths, keep_state=True)
    found = {"logits": out.logits} | {f"record {a}": out[a] for a in record}
    for i in range(CONFIG.n_layer):
        found |= {f"ssm_state {i}": out.state.ssm_state[i], f"conv_state {i}": out.state.conv_state[i]}
    rng = torch.Generator().manual_seed(1)
    loss = sum((x.nan_to_num() * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in found.values())
    names, params = zip(*MODEL.named_parameters(), strict=True)
    wanted = [*params, *(v for v in leaves if v is not None)]
    grads = torch.autograd.grad(loss, wanted, materialize_grads=True) if loss.requires_grad else []
    labels = [*names, *(f"value of {e}" for e, v in zip(edits, leaves, strict=True) if v is not None)]
    return {k: v.detach() for k, v in found.items()} | {f"d/d {k}": g for k, g in zip(labels, grads, strict=False)}


def remade(edit, value):
    extra = {"keep": edit.keep} if isinstance(edit, Project) else {}
    return type(edit)(edit.address, value, rows=edit.rows, **extra)


def agree(one, two, tol=1e-10):
    assert one.keys() == two.keys()
    for name, value in one.items():
        scale = max(1.0, float(value.nan_to_num().abs().max())) if value.numel() else 1.0
        assert value.shape == two[name].shape, name
        assert torch.equal(value.isnan(), two[name].isnan()), name  # positions that a row lacks
        gap = float((value - two[name]).nan_to_num().abs().max()) if value.numel() else 0.0
        assert gap <= tol * scale, f"{name} differs by {gap:.2g} of {scale:.2g}"


SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("site", list(ADDRESSABLE))
def test_the_backends_agree(site):
    @settings(SETTINGS, max_examples=4)
    @given(SEEDS)
    def check(seed):
        scene = scene_of(seed, site=site)
        agree(everything(scene, "reference"), everything(scene, "torch"))

    check()


def test_the_draw_reaches_every_kind_and_form():
    """A check that draws is blind to what it never draws."""
    kinds, forms = set(), set()
    for seed in range(40):
        ids, lengths, before, edits, _ = scene_of(seed)
        kinds.update((type(e).__name__, e.rows is None) for e in edits)
        forms.add((lengths is not None, before is not None, ids.shape[1] > 1))
    assert kinds == {(kind, rows) for kind in KINDS for rows in (True, False)}
    assert len(forms) == 8


@settings(SETTINGS, max_examples=40)
@given(SEEDS, st.sampled_from(["reference", "torch"]))
def test_one_pass_is_token_by_token_is_pieces(seed, backend):
    scene, r = scene_of(seed, padded=False, carried=False), random.Random(seed)
    ids, _, _, edits, record = scene
    b, l = ids.shape
    whole = run(MODEL, ids, edits, record, backend, keep_state=True)
    cuts = sorted(r.sample(range(1, l), r.randint(0, l - 1)))
    for pieces in ([1] * l, [b - a for a, b in zip([0, *cuts], [*cuts, l], strict=True)]):
        zero = torch.zeros(b, dtype=torch.long)
        plan = Plan(CONFIG, edits, record, zero, zero + l)
        state, logits = None, []
        for piece in ids.split(pieces, 1):
            out = MODEL(piece, state=state, keep_state=True, tap=plan, ops=resolve(backend))
            state = out.state
            logits.append(out.logits)
        records = plan.results()
        one = {"logits": whole.logits} | {str(a): whole[a] for a in record}
        two = {"logits": torch.cat(logits, 1)} | {str(a): records[a] for a in record}
        for i in range(CONFIG.n_layer):
            one |= {f"h{i}": whole.state.ssm_state[i], f"c{i}": whole.state.conv_state[i]}
            two |= {f"h{i}": state.ssm_state[i], f"c{i}": state.conv_state[i]}
        agree({k: v.detach() for k, v in one.items()}, {k: v.detach() for k, v in two.items()})


@settings(SETTINGS, max_examples=25)
@given(SEEDS, st.sampled_from(["reference", "torch"]))
def test_a_padded_row_under_drawn_edits_gives_what_it_gives_alone(seed, backend):
    scene = scene_of(seed, padded=True, carried=False)
    ids, lengths, _, edits, record = scene
    edits = [e for e in edits if type(e) in (Zero, Apply, Project) or (e.value is not None and e.value.dim() == 0)]
    out = run(MODEL, ids, edits, record, backend, lengths=lengths, keep_state=True)
    for i, n in enumerate(lengths):
        own = [e for e in edits if e.rows is None or i in e.rows]
        own = [dataclasses.replace(e, rows=None) for e in own]
        alone = run(MODEL, ids[i : i + 1, :n], own, record, backend, keep_state=True)
        agree({"logits": alone.logits[0].detach()}, {"logits": out.logits[i, :n].detach()})
        assert not out.logits[i, n:].any()
        for a, b in zip(
            alone.state.ssm_state + alone.state.conv_state, out.state.ssm_state + out.state.conv_state, strict=True
        ):
            agree({"state": a[0].detach()}, {"state": b[i].detach()})
