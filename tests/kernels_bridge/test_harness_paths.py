"""Faults on one path alone, which only another call or another step size shows, are found all the same."""

from dataclasses import replace

import pytest
import torch
from forks import ask, failed, model
from helpers import slow

from kernels_bridge import resolve
from kernels_bridge.carry import carry
from kernels_bridge.harness import Ours, check
from minimal_mamba import Ops
from minimal_mamba.tap import NO_TAP, Tap


def ours(**parts):
    good = resolve("torch")
    return Ours(model(), Ops("faulty", **{"conv": good.conv, "scan": good.scan, "step": good.step} | parts))


# -- steps that are cut -----------------------------------------------------------------------------------------------


def cut_in_a_scan(cut):
    return {"scan": lambda u, dt, *rest, tap=NO_TAP: resolve("torch").scan(u, cut(dt), *rest, tap=tap)}


def cut_where_a_state_is_edited(cut):
    def scan(u, dt, *rest, tap=NO_TAP):
        return resolve("torch").scan(u, cut(dt) if tap.edited("ssm_state") else dt, *rest, tap=tap)

    return {"scan": scan}


def cut_in_a_step(cut):
    def step(mixer):
        def advance(x, memory):
            ops = Ops("faulty", resolve("torch").conv, cut_in_a_scan(cut)["scan"])
            return mixer(x, memory, None, Tap(), ops)

        return advance

    return {"step": step}


def cut_in_a_block_that_keeps_nothing(cut):
    good = resolve("torch")
    bad = Ops("faulty", good.conv, cut_in_a_scan(cut)["scan"])

    def begin(whole, fresh, keep):
        return good if keep else replace(bad, block=lambda m, x, memory, mask, tap: m(x, memory, mask, Tap(), bad))

    return {"begin": begin}


@pytest.mark.parametrize("bounds", [{"max": 20.0}, *slow({"min": 1e-4})], ids=str)
@pytest.mark.parametrize(
    ("where", "kinds"),
    [
        (cut_in_a_scan, ["model"]),
        (cut_where_a_state_is_edited, ["edits"]),
        (cut_in_a_step, ["decoding"]),
        (cut_in_a_block_that_keeps_nothing, ["model"]),
        (cut_in_a_block_that_keeps_nothing, ["gradients"]),
    ],
)
def test_a_step_that_is_cut_on_one_path_alone_is_seen(where, kinds, bounds):
    """The drawn weights have steps beyond 20, where softplus is the identity, and below a ten-thousandth."""
    target = ours(**where(lambda dt: torch.where(dt > 0, dt.clamp(**bounds), dt)))
    assert not check(target, target.model, kinds=kinds, lengths=[3], progress=False).passed


def test_a_state_that_is_rounded_at_each_token_is_seen():
    """Rounding to 16 bits errs less than a 16-bit model may."""
    good = resolve("torch").step

    def step(mixer):
        def advance(x, memory):
            out, (h, window) = good(mixer)(x, memory)
            return out, (h.bfloat16().to(h.dtype), window)

        return advance

    target = Ours(model(torch.bfloat16), replace(resolve("torch"), step=step))
    report = check(target, target.model, kinds=["decoding"], lengths=[3], progress=False)
    bad = [r for r in report.rows if not r.passed]
    assert {(r.quantity, r.note) for r in bad} == {("last ssm_state", "rounded to bfloat16")}
    assert all(r.error < r.bound for r in bad)


# -- what only another call shows -------------------------------------------------------------------------------------


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

        def kept(x, memory):
            whole = good(mixer)
            own, *rest = whole.args
            return whole.func(own._replace(A=weights), *rest, x, memory)

        return kept

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


def begins_anew_in_training():
    """A block with gradients of its own that is taken from any memory."""
    good = resolve("torch")

    def begin(whole, fresh, keep):
        def block(mixer, x, memory, mask, tap):
            return mixer(x, tuple(torch.zeros_like(m) for m in memory), mask, Tap(), good)

        return Ops("faulty", good.conv, good.scan, block=block if whole.training and not keep else None)

    return ours(begin=begin)


def has_no_gradients_out_of_training():
    good = resolve("torch")

    def scan(u, *rest, tap=NO_TAP):
        return good.scan(u if target.model.training else u.detach(), *rest, tap=tap)

    target = ours(scan=scan)
    return target


def runs_the_padding_where_only_the_end_is_asked_for():
    good = resolve("torch")

    def block(mixer, x, memory, mask, tap):
        return mixer(x, memory, None if tap.last_only else mask, Tap(), good)

    return ours(block=block)


def has_no_gradients_where_only_the_end_is_asked_for():
    good = resolve("torch")

    def block(mixer, x, memory, mask, tap):
        out, memory = mixer(x, memory, mask, Tap(), good)
        return (out.detach() + 0 * x if tap.last_only else out), memory

    return ours(block=block)


def carries_the_decays_of_the_token_before():
    def late(delta, first, count, dt, A, C, gate):
        return carry(delta, first, count, torch.cat([dt[:, :1], dt[:, :-1]], 1), A, C, gate)

    return ours(carry=late)


@pytest.mark.parametrize(
    ("fault", "kinds", "quantity"),
    [
        (begins_anew_in_training, ["padding"], "d mixer.A_log"),
        (has_no_gradients_out_of_training, ["gradients"], "d mixer.conv1d.weight"),
        (runs_the_padding_where_only_the_end_is_asked_for, ["mixers"], "last ssm_state"),
        (has_no_gradients_where_only_the_end_is_asked_for, ["mixers"], "d mixer.out_proj.weight"),
        (carries_the_decays_of_the_token_before, ["operations"], "carry: gated"),
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
