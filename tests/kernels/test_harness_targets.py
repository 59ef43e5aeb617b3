"""The harness on mamba-ssm's own `MambaLMHeadModel`, and on the fused backend over its autograd functions.

In Triton's interpreter a norm and a token's step take a hundred times as long as all else: longer rows have the
packages' plain norms, and are not decoded.
"""

import dataclasses

import pytest
from helpers import slow
from stand_ins import layer_norm_fn

from kernels_bridge.fused import load
from kernels_bridge.fused.ops import make
from kernels_bridge.harness import Ours, bisect, check, target
from kernels_bridge.harness.check import KINDS
from kernels_bridge.harness.draw import ODD, SMALL, draw_model
from kernels_bridge.harness.rows import table
from kernels_bridge.harness.targets import mamba_ssm_model

pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.fixture(scope="module")
def model():
    return draw_model(dataclasses.replace(SMALL, d_model=16, dt_rank=4), 0).float()


@pytest.mark.parametrize(("lengths", "decoding"), [([3], ["decoding"]), ([5, 129, 516], []), *slow(([17, 512], []))])
def test_mamba_ssm_agrees_with_the_readable_model(model, lengths, decoding, request):
    if not decoding:
        request.getfixturevalue("plain_norms")
    kinds = ["mixers", "layers", "model", "gradients", *decoding]
    report = check(target("mamba_ssm", model), model, kinds=kinds, lengths=lengths, progress=False)
    failed = [r for r in report.rows if not r.passed]
    if decoding:  # its step's softplus is log(exp(x) + 1), which keeps three digits of a dt of 1e-5; `fused` takes ours
        assert max(r.worst or 0 for r in failed) > 1e-4 and all(r.error < r.bound for r in failed), table(report.rows)
    assert {(r.kind, r.quantity) for r in failed} <= {("decoding", "last ssm_state")}, table(report.rows)
    named = {r.quantity for r in report.rows}
    assert {"mixer_in", "u", "B", "C", "resid_post", "last ssm_state", "logits", "loss"} <= named
    assert {"d embed", "d mixer.A_log"} <= named
    assert {r.kind for r in report.rows} == {*kinds}


def test_a_fault_in_mamba_ssm_would_be_named(model, plain_norms):
    theirs = mamba_ssm_model(model)

    def slip(module, args, out):
        out = out.clone()
        out[..., 3] *= 1.01
        return out

    theirs.backbone.layers[1].mixer.x_proj.register_forward_hook(slip)
    found = bisect("reference", theirs, model=model, length=5)
    assert (found.first.site, found.first.layer, found.first.channel) == ("dt_low", 1, (3,))


def test_a_fault_of_the_kernels_own_is_named(model, plain_norms):
    """Of the convolution's backward, where a row ends just after a chunk (`kernels._lengthened`)."""
    kinds = ["layers", "mixers", "model", "gradients"]
    report = check(target("mamba_ssm", model), model, kinds=kinds, lengths=[513], progress=False)
    wrong = [r for r in report.rows if not r.passed]
    assert {"d mixer.conv1d.weight", "d mixer.conv1d.bias"} <= {r.quantity for r in wrong}
    assert {r.kind for r in wrong} == {"mixers", "gradients"}


@pytest.mark.parametrize(
    ("lengths", "decoding", "odd"),
    [
        ([3], True, False),
        ([129], False, False),
        ([5], False, True),
        *slow(([513], False, False), ([5, 17], False, True)),
    ],
)
def test_the_fused_backend_passes_under_edits(model, lengths, decoding, odd):
    model = draw_model(ODD, 0).float() if odd else model
    norm = {} if decoding else {"layer_norm_fn": layer_norm_fn}
    ops = make(lambda: dataclasses.replace(load(), device="cpu", **norm), "fused[on a CPU]")
    kinds = [kind for kind in KINDS if decoding or kind not in ("decoding", "updated")]  # the latter decodes, too
    report = check(Ours(model, ops), model, kinds=kinds, lengths=lengths, progress=False)
    assert report.passed, table(report.rows)
