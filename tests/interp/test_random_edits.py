"""Edits that nobody chose: the two backends, one pass and its pieces, agree under whatever hypothesis draws."""

import dataclasses
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scenes import CONFIG, MODEL, agree, everything, scene_of

from interp import Apply, Project, Zero, run
from kernels_bridge import resolve
from minimal_mamba import Plan
from minimal_mamba.edits import KINDS
from minimal_mamba.sites import ADDRESSABLE

SETTINGS = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None
)
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
