"""Columns that are padding in every row, as where all is padded to one width, change nothing."""

import pytest
import torch
from helpers import tiny

from interp import (
    Circuit,
    Knockout,
    all_edges,
    at,
    attention,
    attribution_grid,
    collect,
    contributions,
    direct_logit,
    edge_attribution,
    edges,
    faithfulness,
    generate,
    gradient_field,
    gradients,
    knockout,
    knockout_grid,
    logit_diff,
    logit_lens,
    mean_dt,
    patch_grid,
    path_patch,
    receptive_field,
    run,
    state_flow,
    state_lens,
)  # fmt: skip

MODEL = tiny(seed=1)
IDS, DONOR = torch.randint(0, 29, (2, 3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 4, 3]
Q = {"progress": False}


def metric(logits):
    return logit_diff(logits, 3, 5)


WAYS = {
    "run": lambda i, d, n: run(MODEL, i, lengths=n, record=at.ssm_state(layer=1))[at.ssm_state(layer=1)],
    "last logits": lambda i, d, n: run(MODEL, i, lengths=n).last_logits,
    "generate": lambda i, d, n: generate(MODEL, i, 3, lengths=n, last_only=True).logits,
    "gradients": lambda i, d, n: gradients(MODEL, i, metric, at.u(layer=0), lengths=n)[at.u(layer=0)],
    "collect": lambda i, d, n: collect(MODEL, i, at.u(layer=0), lengths=n, batch=2)[at.u(layer=0)],
    "patch_grid": lambda i, d, n: patch_grid(MODEL, i, d, site="ssm_state", metric=metric, positions=[0, -1],
                                             lengths=n, **Q).values,
    **{f"attribution_grid {site} {how}": lambda i, d, n, site=site, how=how: attribution_grid(
        MODEL, i, d, site=site, metric=metric, positions=[0, -1], lengths=n, **how, **Q).values
       for site in ("ssm_state", "x") for how in ({}, {"steps": 2}, {"steps": 2, "path": "cell"})},
    "path_patch": lambda i, d, n: path_patch(MODEL, i, d, [*edges(MODEL.config, 3)][:40], metric, lengths=n, **Q).effects,
    "edge_attribution": lambda i, d, n: edge_attribution(MODEL, i, d, metric, lengths=n).effects,
    "faithfulness": lambda i, d, n: faithfulness(
        MODEL, i, d, Circuit([*all_edges(MODEL.config, 3)][::2]), metric, lengths=n,
        graph=[*all_edges(MODEL.config, 3)], **Q).score(),
    "knockout": lambda i, d, n: knockout(MODEL, i, Knockout(1, 2, 0), baseline="mean", lengths=n, last_only=True).logits,
    "knockout_grid": lambda i, d, n: knockout_grid(MODEL, i, metric, baseline="mean", lengths=n, sources=[0, 1], **Q).values,
    **{f"attention {form}": lambda i, d, n, form=form: attention(
        MODEL, i, layer=1, form=form, targets=[-1], sources=[0, 1], lengths=n, **Q).weights for form in ("scan", "block")},
    "contributions": lambda i, d, n: contributions(MODEL, i, layer=1, targets=[-1], sources=[0, 1], lengths=n, **Q).values,
    "direct_logit": lambda i, d, n: direct_logit(MODEL, i, 3, lengths=n).total(),
    "state_lens": lambda i, d, n: state_lens(MODEL, i, 3, lengths=n).values[..., :5],
    "logit_lens": lambda i, d, n: torch.stack([*logit_lens(MODEL, i, torch.tensor([[1], [2], [3]]), lengths=n)]),
    "mean_dt": lambda i, d, n: mean_dt(MODEL, i, lengths=n),
    "receptive_field": lambda i, d, n: receptive_field(MODEL, i, 1, lengths=n).share[:, :5],
    "gradient_field": lambda i, d, n: gradient_field(MODEL, i, metric, lengths=n).share[:, :5],
    "state_flow": lambda i, d, n: state_flow(MODEL, i, 1, lengths=n).write[:, :5],
}  # fmt: skip


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1]])
@pytest.mark.parametrize("way", WAYS)
def test_padding_of_every_row_changes_nothing(way, lengths):
    ask, width = WAYS[way], max(lengths)
    if lengths == [1, 1, 1] and way not in ("mean_dt", "state_flow", "receptive_field", "gradient_field", "run"):
        return
    want = ask(IDS[:, :width], DONOR[:, :width], lengths)
    torch.testing.assert_close(ask(IDS, DONOR, lengths), want, equal_nan=True)
