"""Scenes that nobody chose: a batch, what it carries, edits and recordings, drawn from a seed."""

import random

import torch
from helpers import tiny

from interp import Add, Apply, Mean, Project, Scale, Set, Zero, at, run
from minimal_mamba import Plan
from minimal_mamba.sites import ADDRESSABLE

MODEL = tiny(seed=5)
CONFIG = MODEL.config


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


def everything(scene, backend, keep=True):
    """Logits, recordings, final state, and the gradients of all parameters and edit values, by name."""
    ids, lengths, before, edits, record = scene
    leaves = [None if e.value is None else e.value.detach().clone().requires_grad_() for e in edits]
    edits = [e if v is None else remade(e, v) for e, v in zip(edits, leaves, strict=True)]
    state = None if before is None else run(MODEL, before, backend=backend, keep_state=True).state
    out = run(MODEL, ids, edits, record, backend, state=state, lengths=lengths, keep_state=keep)
    found = {"logits": out.logits} | {f"record {a}": out[a] for a in record}
    for i in range(CONFIG.n_layer if keep else 0):
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
