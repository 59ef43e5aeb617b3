"""The harness on mamba-ssm's own `MambaLMHeadModel`, and on the fused backend over its autograd functions."""

import dataclasses

import pytest

from kernels_bridge.fused import load
from kernels_bridge.fused.ops import make
from kernels_bridge.harness import Ours, bisect, check, target
from kernels_bridge.harness.draw import SMALL, draw_model
from kernels_bridge.harness.rows import table
from kernels_bridge.harness.targets import mamba_ssm_model


@pytest.fixture(scope="module")
def model():
    return draw_model(SMALL, 0).float()


def test_mamba_ssm_agrees_with_the_readable_model(model):
    report = check(target("mamba_ssm", model), model, lengths=[5, 17], progress=False)
    assert report.passed, table(report.rows)
    named = {r.quantity for r in report.rows}
    assert {"mixer_in", "u", "B", "C", "resid_post", "last ssm_state", "logits", "loss"} <= named
    assert {"d embed", "d mixer.A_log"} <= named
    assert {r.kind for r in report.rows} == {"layers", "model", "gradients", "decoding"}


def test_a_fault_in_mamba_ssm_would_be_named(model):
    theirs = mamba_ssm_model(model)

    def slip(module, args, out):
        out = out.clone()
        out[..., 3] *= 1.01
        return out

    theirs.backbone.layers[1].mixer.x_proj.register_forward_hook(slip)
    found = bisect("reference", theirs, model=model)
    assert (found.first.site, found.first.layer, found.first.channel) == ("dt_low", 1, (3,))


def test_the_fused_backend_passes_under_edits(model):
    ops = make(lambda: dataclasses.replace(load(), device="cpu"), "fused[stand-in extensions]")
    report = check(Ours(model, ops), model, lengths=[1, 5, 17], progress=False)
    assert report.passed, table(report.rows)
