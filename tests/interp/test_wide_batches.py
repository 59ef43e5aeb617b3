"""Columns that are padding in every row, as where all is padded to one width, change nothing."""

import pytest
import torch
from helpers import tiny

from interp import (
    Circuit,
    Knockout,
    at,
    attention,
    attribution_grid,
    collect,
    contributions,
    direct_logit,
    edge_attribution,
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
from interp.circuits import edges as all_edges

M = tiny(seed=1)
IDS, DONOR = torch.randint(0, 29, (2, 3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 4, 3]
Q = {"progress": False}
EDGES = [*all_edges(M.config, 3)]
CIRCUIT = Circuit(EDGES[::2], [1.0] * len(EDGES[::2]), [1.0] * len(EDGES[::2]))


def metric(logits):
    return logit_diff(logits, 3, 5)


WAYS = {
    "run": lambda i, d, n: run(M, i, lengths=n, record=at.ssm_state(layer=1))[at.ssm_state(layer=1)],
    "last logits": lambda i, d, n: run(M, i, lengths=n).last_logits,
    "generate": lambda i, d, n: generate(M, i, 3, lengths=n, last_only=True).logits,
    "gradients": lambda i, d, n: gradients(M, i, metric, at.u(layer=0), lengths=n)[at.u(layer=0)],
    "collect": lambda i, d, n: collect(M, i, at.u(layer=0), lengths=n, batch=2)[at.u(layer=0)],
    "patch_grid": lambda i, d, n: patch_grid(M, i, d, site="ssm_state", metric=metric, positions=[0, -1],
                                             lengths=n, **Q).values,
    **{f"attribution_grid {site} {how}": lambda i, d, n, site=site, how=how: attribution_grid(
        M, i, d, site=site, metric=metric, positions=[0, -1], lengths=n, **how, **Q).values
       for site in ("ssm_state", "x") for how in ({}, {"steps": 2}, {"steps": 2, "path": "cell"})},
    "path_patch": lambda i, d, n: path_patch(M, i, d, EDGES[:40], metric, lengths=n, **Q).values,
    "edge_attribution": lambda i, d, n: edge_attribution(M, i, d, metric, lengths=[3] * 3).values,
    "faithfulness": lambda i, d, n: faithfulness(M, CIRCUIT, i, d, metric, lengths=[3] * 3, **Q).score(),
    "knockout": lambda i, d, n: knockout(M, i, Knockout(1, 2, 0), baseline="mean", lengths=n).last_logits,
    "knockout_grid": lambda i, d, n: knockout_grid(
        M, i, metric, baseline="mean", lengths=n, sources=[0, 1], **Q).values,
    **{f"attention {form}": lambda i, d, n, form=form: attention(
        M, i, layer=1, form=form, targets=[-1], sources=[0, 1], lengths=n, **Q).weights for form in ("scan", "block")},
    "contributions": lambda i, d, n: contributions(M, i, layer=1, targets=[-1], sources=[0, 1], lengths=n, **Q).values,
    "direct_logit": lambda i, d, n: direct_logit(M, i, 3, lengths=n).total(),
    "state_lens": lambda i, d, n: state_lens(M, i, 3, lengths=n).values[..., : max(n)],
    "logit_lens": lambda i, d, n: torch.stack([*logit_lens(M, i, torch.tensor([[1], [2], [3]]), lengths=n)]),
    "mean_dt": lambda i, d, n: mean_dt(M, i, lengths=n),
    "receptive_field": lambda i, d, n: receptive_field(M, i, 1, lengths=n).share[:, : max(n)],
    "gradient_field": lambda i, d, n: gradient_field(M, i, metric, lengths=n).share[:, : max(n)],
    "state_flow": lambda i, d, n: state_flow(M, i, 1, lengths=n).write[:, : max(n)],
}  # fmt: skip


ONE = ("mean_dt", "state_flow", "receptive_field", "gradient_field", "run")  # where shapes of one would broadcast


@pytest.mark.parametrize(("way", "lengths"), [*((way, LENGTHS) for way in WAYS), *((way, [1, 1, 1]) for way in ONE)])
def test_padding_of_every_row_changes_nothing(way, lengths):
    ask, width = WAYS[way], 3 if way in ("edge_attribution", "faithfulness") else max(lengths)
    want = ask(IDS[:, :width], DONOR[:, :width], lengths)
    torch.testing.assert_close(ask(IDS, DONOR, lengths), want, equal_nan=True)
