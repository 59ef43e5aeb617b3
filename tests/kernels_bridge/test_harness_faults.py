"""Every fault that is planted is found, and named where: in operations, in modules, in blocks of several lines."""

import dataclasses

import pytest
import torch
from forks import CONFIG, ask, failed, faulty, model, plain, swapped, with_tf32
from helpers import needs_hf_scan

from kernels_bridge import resolve
from kernels_bridge.harness import Blind, Ours, Theirs, bisect, check, target
from kernels_bridge.harness.draw import SMALL, draw_model
from minimal_mamba import Mamba, MambaConfig, Ops
from minimal_mamba.block import divided
from minimal_mamba.scan import causal_conv, selective_scan, ssm_step
from minimal_mamba.tap import NO_TAP, Tap

# -- planted faults ---------------------------------------------------------------------------------------------------


def conv_off_by_one(x, weight, bias, window, *, mask=None, tap=NO_TAP):
    return causal_conv(x, weight.roll(1, 1), bias, window, mask=mask, tap=tap)


def padding_forgotten(x, weight, bias, window, *, mask=None, tap=NO_TAP):
    return causal_conv(x, weight, bias, window, mask=None, tap=tap)


def pad_tokens_written(u, dt, A, B, C, h, *, tap=NO_TAP):
    return selective_scan(u, torch.where(dt == 0, 1e-3, dt), A, B, C, h, tap=tap)


def bfloat16_state(u, dt, A, B, C, h, *, tap=NO_TAP):
    ys = []
    for t in range(u.shape[1]):
        h, y = ssm_step(h, u[:, t], dt[:, t], A, B[:, t], C[:, t], tap=tap, t=t)
        h = h.to(torch.bfloat16).to(h.dtype)
        ys.append(y)
    return torch.stack(ys, 1), h


def last_state_without_gradient(u, dt, A, B, C, h, *, tap=NO_TAP):
    y, h = resolve("torch").scan(u, dt, A, B, C, h, tap=tap)
    return y, h.detach()


class _NoJacobianOfDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dt):
        return dt.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


def jacobian_missing(u, dt, A, B, C, h, *, tap=NO_TAP):
    return resolve("torch").scan(u, _NoJacobianOfDecay.apply(dt), A, B, C, h, tap=tap)


@pytest.mark.parametrize(
    ("fault", "quantity", "site"),
    [
        ({"conv": conv_off_by_one}, "conv: out", "conv"),
        ({"scan": bfloat16_state}, "scan: states", "ssm_state"),
        ({"scan": swapped}, "scan: y", "state_write"),
        ({"scan": jacobian_missing}, "scan: d dt", None),
        ({"scan": last_state_without_gradient}, "scan: d h", None),
    ],
)
def test_a_fault_in_an_operation_is_found_and_named(fault, quantity, site):
    report = ask(faulty(**fault), kinds=["operations", "layers"])
    assert not report.passed and quantity in failed(report)
    assert (report.first.site if report.first else None) == site
    if site:
        assert report.first.layer == 0


@pytest.mark.parametrize(
    ("fault", "quantity"),
    [({"conv": padding_forgotten}, "last conv_state"), ({"scan": pad_tokens_written}, "last ssm_state")],
)
def test_padding_that_reaches_the_memory_is_found(fault, quantity):
    weights = model()
    report = ask(faulty(**fault), weights, kinds=["padding"])
    assert quantity in failed(report)
    assert ask(faulty(**fault), weights, kinds=["model"]).passed  # and without padding there is no fault


def test_tf32_left_on_is_found():
    report = ask(Theirs(with_tf32(), "fork"), kinds=["layers", "model", "gradients"])
    assert (report.first.site, report.first.layer) == ("x", 0)
    assert {"logits", "d embed"} <= failed(report)
    assert (
        max(r.error for r in report.rows if r.kind != "gradients") < 3e-2
    )  # small enough that a looser bound would let it pass


def test_one_position_of_a_long_row_is_enough():
    """In 16 bits the error of the whole is within its bound: two fifths of one of 770 positions."""

    def forgets(u, dt, A, B, C, h, *, tap=NO_TAP):
        y, h = resolve("torch").scan(u, dt, A, B, C, h, tap=tap)
        kept = torch.ones(y.shape[1])
        kept[200:201] = 0.6
        return y * kept[:, None], h

    weights, good = model(torch.bfloat16), resolve("torch")
    target = Ours(weights, Ops("faulty", good.conv, forgets))
    report = check(target, weights, kinds=["layers"], lengths=[385], progress=False)
    y = next(r for r in report.rows if (r.quantity, r.layer) == ("y", 0))
    assert y.error < y.bound and y.worst > y.worst_bound and not y.passed
    assert (report.first.site, report.first.layer, report.first.position) == ("y", 0, 200)


def test_a_fault_that_only_a_long_row_has_is_named():
    """As at the border of a kernel's chunks."""

    def loses(u, dt, A, B, C, h, *, tap=NO_TAP):
        ys = []
        for t in range(u.shape[1]):
            h, y = ssm_step(0.999 * h if t == 100 else h, u[:, t], dt[:, t], A, B[:, t], C[:, t], tap=tap, t=t)
            ys.append(y)
        return torch.stack(ys, 1), h

    weights = model()
    report = check(faulty(scan=loses), weights, kinds=["layers", "model"], lengths=[5, 129], progress=False)
    assert "logits" in failed(report) and {r.case for r in report.rows if not r.passed} <= {
        "layers, batch 2, length 129, seed 1",
        "model, batch 2, length 129, seed 1",
        "model, batch 1, length 129, seed 2",
    }
    assert (report.first.site, report.first.layer, report.first.position) == ("ssm_state", 0, 100)


def test_softplus_missing_is_found(monkeypatch):
    needs_hf_scan()
    import transformers.models.mamba.modeling_mamba as modeling

    good = modeling.mamba_selective_scan
    monkeypatch.setattr(modeling, "mamba_selective_scan", lambda *a, **k: good(*a, **{**k, "delta_softplus": False}))
    report = ask(Theirs(plain(), "fork"), kinds=["layers", "model"])
    assert (report.first.site, report.first.layer) == ("gated", 0)


def test_the_first_place_is_named_to_the_channel():
    found = bisect("torch", "forks:with_a_slip", length=9)
    assert (found.first.site, found.first.layer, found.first.row, found.first.position) == ("B", 1, 2, 4)
    assert found.first.channel == (2,)
    assert "forks:with_a_slip is the one that is off" in found.verdict()


def test_blind_weights_get_no_verdict():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blind = Mamba(MambaConfig(d_model=32, n_layer=2, vocab_size=29))
    with pytest.raises(Blind, match=r"no verdict.*scan zeroed"):
        ask(target("torch", blind), blind)


@torch.no_grad()
def test_steps_outside_of_the_middle_are_seen():
    for bounds in ({"min": 1e-3}, {"max": 10.0}):

        def clamps(u, dt, A, B, C, h, *, tap=NO_TAP, bounds=bounds):
            return resolve("torch").scan(u, dt.clamp(**bounds), A, B, C, h, tap=tap)

        with torch.enable_grad():
            assert "scan: y" in failed(ask(faulty(scan=clamps), kinds=["operations"]))


def test_a_state_of_fewer_bits_is_seen_in_itself():
    def rounds(u, dt, A, B, C, h, *, tap=NO_TAP):
        y, h = resolve("torch").scan(u, dt, A, B, C, h, tap=tap)
        return y, h.to(torch.bfloat16)

    for weights in (model(), model(torch.bfloat16)):
        target = Ours(weights, Ops("faulty", resolve("torch").conv, rounds))
        report = check(target, weights, kinds=["operations"], lengths=[5], progress=False)
        assert "scan: last state" in failed(report)


def test_an_edit_of_a_padded_row_that_forgets_the_padding_is_found():
    def forgets(x, weight, bias, window, *, mask=None, tap=NO_TAP):
        mask = None if tap.edited("conv_state") else mask
        return resolve("torch").conv(x, weight, bias, window, mask=mask, tap=tap)

    kinds, lengths = ["edits"], [5, 6, 7, 8]
    report = check(faulty(conv=forgets), model(), kinds=kinds, lengths=lengths, progress=False)
    assert "last conv_state" in failed(report)


def test_an_edit_beyond_the_end_of_a_row_leaves_its_window():
    """The row is padding at the position that is stepped at, and has none of the tokens after it."""

    def steps(x, weight, bias, window, *, mask=None, tap=NO_TAP):
        if mask is not None:
            mask = mask.clone()
            mask[:, tap.edited("conv_state")] = True
        return causal_conv(x, weight, bias, window, mask=mask, tap=tap)

    def goes_on(x, weight, bias, window, *, mask=None, tap=NO_TAP):
        y, after = causal_conv(x, weight, bias, window, mask=mask, tap=tap)
        if mask is None or not tap.edited("conv_state"):
            return y, after
        ended = mask.sum(1) <= tap.edited("conv_state")[-1] + 1
        return y, torch.where(ended[:, None, None], 0 * after, after)

    for fault in (steps, goes_on):
        report = check(faulty(conv=fault), model(), kinds=["edits"], lengths=[5], progress=False)
        assert failed(report) == {"last conv_state"}


# -- what a block of several lines may hide ---------------------------------------------------------------------------


def blocked(change):
    """`torch`, with a block that runs the mixer line by line, and then changes what it gives."""
    good = resolve("torch")

    def block(mixer, x, memory, mask, tap):
        inside = Tap()
        inside.record = tap.record  # type: ignore[method-assign]
        return change(mixer(x, memory, mask, inside, good), x, memory, mask, tap, mixer, good)

    return Ours(model(), Ops("faulty", good.conv, good.scan, block=block))


def forgets_what_was_carried(out, x, memory, mask, tap, mixer, ops):
    return mixer(x, tuple(torch.zeros_like(m) for m in memory), mask, Tap(), ops) if x.shape[1] > 1 else out


def leaves_another_state(out, x, memory, mask, tap, mixer, ops):
    mixed, (h, window) = out
    return mixed, (0.5 * h if x.shape[1] > 1 and mask is None else h, window)


def is_another_for_one_row(out, x, memory, mask, tap, mixer, ops):
    return (0.5 * out[0] if len(x) == 1 else out[0]), out[1]


def loses_rows_that_end_late(out, x, memory, mask, tap, mixer, ops):
    mixed, (h, window) = out
    if mask is not None:
        sizes = mask.sum(1)
        window = torch.where(((sizes > 64) & (sizes < x.shape[1]))[:, None, None], 0.0, window)
    return mixed, (h, window)


@pytest.mark.parametrize(
    ("change", "kinds", "quantity"),
    [
        (forgets_what_was_carried, ["decoding"], "logits"),
        (leaves_another_state, ["model"], "last ssm_state"),
        (is_another_for_one_row, ["model"], "logits"),
        (is_another_for_one_row, ["decoding"], "logits"),
        (loses_rows_that_end_late, ["padding"], "last conv_state"),
    ],
)
def test_a_fault_of_a_block_is_found(change, kinds, quantity):
    lengths = [70] if kinds == ["padding"] else [5, 17]
    assert check(blocked(lambda out, *_: out), model(), kinds=kinds, lengths=lengths, progress=False).passed
    report = check(blocked(change), model(), kinds=kinds, lengths=lengths, progress=False)
    assert quantity in failed(report) and report.first is None


def test_one_channel_of_a_blocks_gradient_is_enough_in_sixteen_bits():
    """In the gradients of the whole model it is less than rounding."""
    good = resolve("torch")

    def block(mixer, x, memory, mask, tap):
        kept = torch.ones_like(mixer.A_log)
        kept[3] = 0
        whole = mixer.A_log.detach() * (1 - kept) + mixer.A_log * kept
        with torch.nn.utils.stateless._reparametrize_module(mixer, {"A_log": whole}):
            return mixer(x, memory, mask, Tap(), good)

    weights = draw_model(SMALL, 0).to(torch.bfloat16)
    target = Ours(weights, Ops("faulty", good.conv, good.scan, block=block))
    found = {}
    for kind in ("mixers", "gradients"):
        report = check(target, weights, kinds=[kind], lengths=[17], progress=False)
        found[kind] = {(r.quantity, r.error > r.bound) for r in report.rows if not r.passed}
    assert found == {"mixers": {("d mixer.A_log", True)}, "gradients": set()}


def test_a_norm_without_its_jacobian_is_found():
    """As mamba-ssm's own block gives FalconMamba's gradients: the outputs are right."""
    good, weights = resolve("torch"), draw_model(dataclasses.replace(CONFIG, mixer_rms_eps=1e-6), 0).float()

    def constant(x, eps):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()

    for fault in (divided, constant):

        def block(mixer, x, memory, mask, tap, fault=fault):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("minimal_mamba.block.divided", fault)
                return mixer(x, memory, mask, Tap(), good)

        target = Ours(weights, Ops("faulty", good.conv, good.scan, block=block))
        found = {}
        for kind in ("mixers", "model", "gradients"):
            found[kind] = failed(check(target, weights, kinds=[kind], lengths=[17], progress=False))
        if fault is divided:
            assert not any(found.values())
        else:
            wrong = {"d mixer_in", "d mixer.x_proj.weight", "d mixer.conv1d.weight", "d mixer.in_proj.weight"}
            assert wrong <= found["mixers"] and "d mixer.x_proj.weight" in found["gradients"] and not found["model"]


def test_what_a_block_records_is_seen():
    class Zeroed(Tap):
        def __init__(self, tap):
            self.recorded, self.tap = tap.recorded, tap

        def record(self, site, values, times):
            self.tap.record(site, 0 * values, times)

    good = resolve("torch")
    for fault, passes in ((lambda tap: tap, True), (Zeroed, False)):

        def block(mixer, x, memory, mask, tap, fault=fault):
            return mixer(x, memory, mask, fault(tap), good)

        ops = Ops("faulty", good.conv, good.scan, block=block, records=("ssm_state",))
        report = check(Ours(model(), ops), model(), kinds=["model"], lengths=[5], progress=False)
        assert report.passed == passes and failed(report) == (set() if passes else {"ssm_state"})
