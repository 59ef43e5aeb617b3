"""Every fault that is planted is found, and named where: in operations, in modules, in blocks of several lines."""

import pytest
import torch
from forks import ask, failed, faulty, model, plain, swapped, with_tf32

from kernels_bridge import resolve
from kernels_bridge.harness import Blind, Ours, Theirs, bisect, check, target
from kernels_bridge.harness.draw import SMALL, draw_model
from minimal_mamba import Mamba, MambaConfig, Ops
from minimal_mamba.scan import causal_conv, selective_scan, ssm_step
from minimal_mamba.tap import NO_TAP, Tap

# -- planted faults ---------------------------------------------------------------------------------------------------


def conv_off_by_one(x, weight, bias, window, *, mask=None, tap=NO_TAP):
    return causal_conv(x, weight.roll(1, 1), bias, window, mask=mask, tap=tap)


def padding_forgotten(x, weight, bias, window, *, mask=None, tap=NO_TAP):
    return causal_conv(x, weight, bias, window, mask=None, tap=tap)


def pad_tokens_written(u, dt, A, B, C, h, *, tap=NO_TAP):
    return selective_scan(u, dt.clamp(min=1e-3), A, B, C, h, tap=tap)


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
    assert max(r.error for r in report.rows) < 3e-2  # small enough that a looser bound would let it pass


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


# -- what only another call shows -------------------------------------------------------------------------------------


def ours(**parts):
    good = resolve("torch")
    return Ours(model(), Ops("faulty", **{"conv": good.conv, "scan": good.scan, "step": good.step} | parts))


def begins_anew_unless_kept():
    """As a fused block would that is taken wherever no memory is asked for."""
    good = resolve("torch")

    def begin(whole, fresh, keep):
        def block(mixer, x, memory, mask, tap):
            return mixer(x, tuple(torch.zeros_like(m) for m in memory), mask, Tap(), good)

        return Ops("faulty", good.conv, good.scan, block=None if keep else block)

    return ours(begin=begin)


def writes_to_what_it_is_given():
    """As `selective_state_update` and `causal_conv1d_update` do; only to a state that is given, not to a blank one."""
    good = resolve("torch").step

    def step(mixer):
        def advance(x, memory):
            out, after = good(mixer)(x, memory)
            if bool(memory[0].any()):
                memory[0].copy_(after[0])
            return out, after

        return advance

    return ours(step=step)


def keeps_what_it_made_of_the_weights():
    good, made = resolve("torch").step, {}

    def step(mixer):
        weights = made.setdefault(id(mixer), -torch.exp(mixer.A_log.detach()))
        return lambda x, memory: good(mixer).func(good(mixer).args[0]._replace(A=weights), x, memory)

    return ours(step=step)


def takes_the_last_column_of_a_padded_row():
    good = resolve("torch")

    def block(mixer, x, memory, mask, tap):
        mixed, memory = mixer(x, memory, mask, Tap(), good)
        return (mixed[:, -1:] if tap.last_only else mixed), memory

    return ours(block=block)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


def halves_the_gradients_of_states():
    good = resolve("torch").scan

    def scan(*args, tap=NO_TAP):
        probed = tap.probed
        tap.probed = lambda *where: None if (found := probed(*where)) is None else (found[0], _Half.apply(found[1]))
        return good(*args, tap=tap)

    return ours(scan=scan)


def reads_a_replaced_state_as_it_is():
    good = resolve("torch").scan

    class Unread(Tap):
        def __init__(self, tap):
            self.tap, self.replaced = tap, {*tap.overwritten()}

        def __getattribute__(self, name):
            own = name in ("tap", "replaced") or name.startswith("__")
            return object.__getattribute__(self, name) if own else getattr(self.tap, name)

        def __call__(self, site, value, t=None):
            found = self.tap(site, value, t)
            return value if site == "state_read" and t in self.replaced else found

    return ours(scan=lambda *args, tap=NO_TAP: good(*args, tap=Unread(tap)))


@pytest.mark.parametrize(
    ("fault", "kinds", "quantity"),
    [
        (begins_anew_unless_kept, ["decoding"], "logits"),
        (begins_anew_unless_kept, ["padding"], "logits"),
        (writes_to_what_it_is_given, ["decoding"], "carried ssm_state"),
        (keeps_what_it_made_of_the_weights, ["updated"], "logits"),
        (takes_the_last_column_of_a_padded_row, ["mixers"], "mixer_out"),
        (halves_the_gradients_of_states, ["gradients"], "d ssm_state"),
        (halves_the_gradients_of_states, ["edits"], "d ssm_state"),
        (reads_a_replaced_state_as_it_is, ["edits"], "y"),
    ],
)
def test_a_fault_that_only_another_call_shows_is_found(fault, kinds, quantity):
    target = fault()
    report = check(target, target.model, kinds=kinds, lengths=[2, 3, 5], progress=False)
    assert quantity in failed(report)


def test_the_check_leaves_the_weights_and_the_mode_as_they_were():
    target = ours()
    target.model.eval()
    before = {name: p.clone() for name, p in target.model.state_dict().items()}
    assert ask(target, target.model, kinds=["mixers", "gradients", "updated"]).passed
    assert all(torch.equal(p, before[name]) for name, p in target.model.state_dict().items())
    assert not any(module.training for module in target.model.modules())
