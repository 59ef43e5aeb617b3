"""The facade: MambaLens' and TransformerLens' names give what their code gives, and its README's examples run."""

from functools import partial

import pytest
import torch
from helpers import tiny
from torch.nn import functional as F

from interp import Set, at, gradients, run
from interp.hook_names import ALIASES, BLOCK, DERIVED, MODEL, REFUSED, address
from interp.hooked import HookedMamba, HookPoint
from minimal_mamba import Mamba
from minimal_mamba.errors import (
    AddressError,
    EditError,
    InputError,
    MambascopeError,
    NotReached,
    NotRecorded,
    UnknownSiteError,
)

MODEL_ = tiny(seed=4)
L, B = 7, 2
RNG = torch.Generator().manual_seed(1)
IDS, OTHER = (torch.randint(0, 29, (B, L), generator=RNG) for _ in range(2))
BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])


def lens(model, ids, hook):
    """MambaLens' forward, line by line, and TransformerLens' eager scan where its names are hooked.

    hook(name, value) -> value is called at every hook point. (MambaLens overwrites what `hook_h_start` returned by
    zeros; here it counts.)
    """
    n_layer, backbone = len(model.backbone.layers), model.backbone
    resid = hook("hook_embed", backbone.embedding(ids))
    for i in range(n_layer):
        layer, m = backbone.layers[i], backbone.layers[i].mixer
        e, n, r = m.A_log.shape[0], m.A_log.shape[1], m.dt_proj.weight.shape[1]

        def at_(name, value, i=i):
            return hook(f"blocks.{i}.{name}", value)

        resid = at_("hook_resid_pre", resid)
        normal = at_("hook_normalized_input", layer.norm(at_("hook_layer_input", resid.clone())))
        x_in = at_("hook_in_proj", normal @ m.in_proj.weight[:e].T)
        skip = at_("hook_skip", normal @ m.in_proj.weight[e:].T)
        conv = at_("hook_conv", m.conv1d(x_in.transpose(1, 2)).transpose(1, 2)[:, : ids.shape[1]])
        x = at_("hook_ssm_input", F.silu(conv))
        A = at_("hook_A", -torch.exp(m.A_log))
        h = at_("hook_h_start", x.new_zeros(len(ids), e, n))
        delta_1 = at_("hook_delta_1", x @ m.x_proj.weight[:r].T)
        delta_2 = at_("hook_delta_2", delta_1 @ m.dt_proj.weight.T + m.dt_proj.bias)
        delta = at_("hook_delta", F.softplus(delta_2))
        A_bar = at_("hook_A_bar", torch.exp(torch.einsum("ble,en->blen", delta, A)))
        in_B = at_("hook_B", x @ m.x_proj.weight[r : r + n].T)
        B_bar = at_("hook_B_bar", torch.einsum("ble,bln->blen", delta, in_B))
        C = at_("hook_C", x @ m.x_proj.weight[r + n :].T)
        writes = at_("mixer.hook_ssm_write", (B_bar * x[..., None]).transpose(1, 2)).transpose(1, 2)
        states = []
        for t in range(ids.shape[1]):
            h = at_(f"hook_h.{t}", h * A_bar[:, t] + writes[:, t])
            states.append(h)
        states = at_("mixer.hook_ssm_state", torch.stack(states, 2))  # (b, e, l, n)
        y = at_("hook_y", torch.einsum("beln,bln->ble", states, C))
        y = at_("hook_ssm_output", y + x * m.D)
        out = at_("hook_out_proj", at_("hook_after_skip", y * F.silu(skip)) @ m.out_proj.weight.T)
        resid = at_("hook_resid_post", resid + out)
    normal = hook("hook_norm", backbone.norm_f(resid))
    return hook("hook_logits", normal @ model.lm_head.weight.T)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def peer(hooks=(), ids=IDS, cache=None):
    hooks = [hooks] if isinstance(hooks, tuple) and hooks else list(hooks)

    def hook(name, value):
        for chosen, fn in hooks:
            if chosen == name:
                out = fn(value, hook=HookPoint(name))
                value = value if out is None else out
        if cache is not None:
            cache[name] = value.clone()
        return value

    return lens(MODEL_, ids, hook)


def bend(value, hook):
    """An edit that is another number at every place, and not linear."""
    ramp = torch.linspace(0.2, 1.4, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value * ramp + 0.1 * value.abs().sqrt()


NAMES = HookedMamba(MODEL_).get_all_hook_names(IDS)


@BOTH
def test_everything_cached_is_what_mambalens_computes(backend):
    truth = {}
    logits = peer(cache=truth)
    hooked = HookedMamba(MODEL_, backend=backend)
    out, cache = hooked.run_with_cache(IDS, names_filter=lambda name: True)
    close(out, logits)
    assert set(cache) == set(truth) == set(NAMES) and len(NAMES) == 3 + 3 * (22 + L + 1)
    for name in NAMES:
        close(cache[name], truth[name])
        assert not cache[name].requires_grad
    assert set(hooked.run_with_cache(IDS)[1]) == {n for n in NAMES if ".mixer." not in n}


@BOTH
@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("hook_A") and not n.startswith("blocks.2")])
def test_a_hook_on_any_name_does_what_it_does_in_mambalens(name, backend):
    bent = partial(bend) if not name.endswith("hook_h_start") else lambda v, hook: v + 0.3
    truth = {}
    want = peer((name, bent), cache=truth)
    got, cache = HookedMamba(MODEL_, backend=backend).run_with_cache(
        IDS, fwd_hooks=[(name, bent)], names_filter=lambda n: True
    )
    close(got, want)
    assert (got - peer()).abs().max() > 1e-6
    for n in cache:  # also of names that are made of sites, whichever name's hook wrote those, and of later layers
        close(cache[n], truth[n])


@BOTH
def test_hooks_on_several_names_at_once(backend):
    """Derived values are made of what the other hooks left, in whatever order they are given."""
    names = (
        *("hook_A_bar", "hook_resid_pre", "hook_layer_input", "hook_delta_1", "hook_delta", "mixer.hook_ssm_state"),
        *("hook_delta_2", "hook_C", "hook_y", "hook_h.3", "hook_B", "hook_B_bar", "hook_normalized_input"),
    )
    hooks = [(f"blocks.{i}.{name}", bend) for i in (0, 2) for name in names]
    hooked = HookedMamba(MODEL_, backend=backend)
    truth = {}
    want = peer(hooks, cache=truth)
    with torch.no_grad():
        close(hooked.run_with_hooks(IDS, fwd_hooks=hooks[::-1]), want)
        out, cache = hooked.run_with_cache(IDS, fwd_hooks=hooks, names_filter=lambda n: True)
    close(out, want)
    for n in cache:
        close(cache[n], truth[n])


# -- the trap ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("pos", [0, 3, 6])
def test_mambalens_state_propagates_and_transformerlens_state_does_not(pos, backend):
    hooked = HookedMamba(MODEL_, backend=backend)
    value = torch.randn(B, 24, 5, generator=RNG, dtype=torch.float64)

    def readout_only(states, hook):
        assert states.shape == (B, 24, L, 5)
        states[:, :, pos] = value

    with torch.no_grad():
        propagates = hooked.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.hook_h.{pos}", lambda h, hook: value)])
        read = hooked.run_with_hooks(IDS, fwd_hooks=[("blocks.1.mixer.hook_ssm_state", readout_only)])
        close(propagates, run(MODEL_, IDS, Set(at.ssm_state(layer=1, pos=pos), value)).logits)
        close(read, run(MODEL_, IDS, Set(at.state_read(layer=1, pos=pos), value)).logits)
    _, cache = hooked.run_with_cache(
        IDS, names_filter=["blocks.1.hook_y"], fwd_hooks=[("blocks.1.mixer.hook_ssm_state", readout_only)]
    )
    moved = (cache["blocks.1.hook_y"] - hooked.run_with_cache(IDS)[1]["y", 1]).abs().amax((0, 2)) > 1e-12
    assert moved.nonzero().flatten().tolist() == [pos]
    assert address("blocks.1.hook_h.3", MODEL_.config) == at.ssm_state(layer=1, pos=3)


# -- MambaLens' README, restated --------------------------------------------------------------------------------------


def logit_diff(logits, answer=3, foil=5):
    return logits[0, -1, answer] - logits[0, -1, foil]


@torch.no_grad()
def test_readme_patching_the_hidden_state():
    model = HookedMamba(MODEL_)
    corrupted_logits, corrupted_activations = model.run_with_cache(OTHER)
    low, high = logit_diff(corrupted_logits), logit_diff(model(IDS))

    def h_patching_hook(h, hook, layer, position):
        return corrupted_activations[hook.name]

    result = torch.zeros((model.cfg.n_layers, L), device=model.cfg.device)
    for layer in range(model.cfg.n_layers):
        for position in range(L):
            patching_hook_name = f"blocks.{layer}.hook_h.{position}"
            patching_hook = partial(h_patching_hook, layer=layer, position=position)
            patched = model.run_with_hooks(IDS, fwd_hooks=[(patching_hook_name, patching_hook)], fast_ssm=True)
            result[layer, position] = 1.0 - (logit_diff(patched) - low) / (high - low)
            place = at.ssm_state(layer=layer, pos=position)
            edit = Set(place, run(MODEL_, OTHER, record=place)[place])
            close(patched, run(MODEL_, IDS, edit).logits)
            close(patched, peer((patching_hook_name, lambda h, hook, edit=edit: edit.to)))
    assert result.abs().min() > 0 and result.std() > 0.01


@torch.no_grad()
def test_readme_patching_the_layer_inputs():
    """The hook changes its value in place; what is cached is not changed by it."""
    model = HookedMamba(MODEL_)
    _, corrupted_activations = model.run_with_cache(OTHER, names_filter=lambda name: "resid_pre" in name)
    assert set(corrupted_activations) == {f"blocks.{i}.hook_resid_pre" for i in range(3)}
    before = {k: v.clone() for k, v in corrupted_activations.items()}

    def resid_pre_patching_hook(resid_pre, hook, position, layer):
        resid_pre[:, position, :] = corrupted_activations[hook.name][:, position, :]
        return resid_pre

    for layer in range(model.cfg.n_layers):
        for position in range(L):
            hook = partial(resid_pre_patching_hook, layer=layer, position=position)
            patched = model.run_with_hooks(IDS, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", hook)])
            place = at.resid_pre(layer=layer, pos=position)
            close(patched, run(MODEL_, IDS, Set(place, run(MODEL_, OTHER, record=place)[place])).logits)
    assert all(torch.equal(before[k], corrupted_activations[k]) for k in before)


class Words:
    """A tokenizer of Hugging Face's form: a number is a token."""

    bos_token_id = 7

    def encode(self, text, add_special_tokens=True):
        return [7] * add_special_tokens + [int(w) for w in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def test_readme_loading_and_text(tmp_path):
    MODEL_.save_pretrained(tmp_path)
    model = HookedMamba.from_pretrained(tmp_path, device="cpu", tokenizer=Words())
    assert isinstance(model.model, Mamba) and model.cfg.n_layers == 3 and model.cfg.vocab_size == model.cfg.V == 32
    logits, activations = model.run_with_cache("3 5 11")
    assert logits.shape == (1, 4, 32) and activations["blocks.2.hook_h.3"].shape == (1, 24, 5)
    tokens = model.to_tokens("3 5 11")
    assert tokens.tolist() == [[7, 3, 5, 11]] and torch.equal(model(tokens), logits)
    assert model.to_tokens(["3 5", "1 2"], prepend_bos=False).tolist() == [[3, 5], [1, 2]]
    assert model.to_str_tokens(tokens) == model.to_str_tokens("3 5 11") == ["7", "3", "5", "11"]
    assert model.to_single_token("11") == 11 and model.to_string(tokens[0]) == "7 3 5 11"
    with pytest.raises(InputError, match="2 tokens, not one"):
        model.to_single_token("1 2")
    with pytest.raises(InputError, match=r"\[3, 2\] tokens; the facade takes one length"):
        model.to_tokens(["3 5", "1"])
    with pytest.raises(InputError, match="needs a tokenizer"):
        HookedMamba(MODEL_)("3 5")

    class Bare:
        def encode(self, text):
            return [1]

    with pytest.raises(InputError, match="prepend_bos=False"):
        HookedMamba(MODEL_, Bare()).to_tokens("x")
    assert HookedMamba(MODEL_, Bare()).to_tokens("x", prepend_bos=False).tolist() == [[1]]


def test_calls_of_any_torch_module_go_to_the_model():
    own = tiny(seed=4)
    model = HookedMamba(own)
    assert model.eval() is model and not own.training
    assert model.train() is model and own.training
    assert model.train(False) is model and not own.training
    assert model.to("cpu") is model.cpu() is model
    assert model.requires_grad_(False) is model and not any(p.requires_grad for p in own.parameters())
    assert not model(IDS).requires_grad
    model.requires_grad_(True)(IDS, return_type="loss").backward()
    assert all(p.grad is not None for p in own.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in own.parameters())
    assert [*map(id, model.parameters())] == [*map(id, own.parameters())]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in own.named_parameters()]
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.to(torch.float32) is model and own.dtype == model(IDS).dtype == torch.float32
    with pytest.raises(RuntimeError, match="device"):
        model.to("nowhere")


# -- the calls --------------------------------------------------------------------------------------------------------


def test_hooks_see_their_name_and_may_return_nothing():
    seen = []

    def look(value, hook):
        seen.append((hook.name, hook.layer(), tuple(value.shape)))

    hooked = HookedMamba(MODEL_)
    with torch.no_grad():
        clean = run(MODEL_, IDS).logits
        hooks = [(lambda n: n.endswith(("hook_y", "hook_h.2")), look), ("blocks.1.hook_h.6", look)]
        close(hooked.run_with_hooks(IDS, fwd_hooks=hooks), clean)

        def in_place(value, hook):
            value *= 0

        for name in DERIVED:  # once a run, with all positions
            once = []
            hooked.run_with_hooks(IDS, fwd_hooks=[(f"blocks.0.{name}", lambda v, hook, once=once: once.append(v))])
            assert len(once) == 1
        zeroed = hooked.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_out_proj", in_place)])
        close(zeroed, peer(("blocks.1.hook_out_proj", lambda v, hook: v * 0)))
        close(hooked(IDS[0]), clean[:1])  # nothing stayed, and one row may come without its axis
    assert sorted(seen) == sorted(
        [(f"blocks.{i}.hook_y", i, (B, L, 24)) for i in range(3)]
        + [(f"blocks.{i}.hook_h.2", i, (B, 24, 5)) for i in range(3)]
        + [("blocks.1.hook_h.6", 1, (B, 24, 5))]
    )
    with pytest.raises(InputError, match="no layer"):
        HookPoint("hook_embed").layer()


@torch.no_grad()
def test_a_predicate_hooks_one_name_a_value():
    """All that it matches but the parameter, and a write's second name."""
    hooked = HookedMamba(MODEL_)

    def fired(predicate):
        seen = []
        hooked.run_with_hooks(IDS, fwd_hooks=[(predicate, lambda v, hook: seen.append(hook.name))])
        return sorted(seen)

    usual = sorted(n for n in NAMES if not n.endswith(("hook_A", "mixer.hook_ssm_write")))
    assert fired(lambda n: True) == usual
    assert fired(lambda n: n.startswith("blocks.0")) == [n for n in usual if n.startswith("blocks.0")]
    both = ["blocks.0.hook_y", "blocks.0.mixer.hook_ssm_state"]
    assert fired(lambda n: n in both) == both
    assert fired(lambda n: "mixer" in n) == sorted(n for n in NAMES if ".mixer." in n)
    assert fired(lambda n: n.endswith("1.mixer.hook_ssm_write")) == ["blocks.1.mixer.hook_ssm_write"]
    with pytest.raises(EditError, match="is a parameter"):
        fired(lambda n: n.endswith("hook_A"))


@torch.no_grad()
def test_hooks_of_one_value_share_a_context_for_one_run():
    hooked, met = HookedMamba(MODEL_), []

    def keep(value, hook):
        assert not hook.ctx  # neither of another name nor of a run before
        hook.ctx["before"] = value.clone()
        return value * 2

    def undo(value, hook):
        met.append(hook.name)
        return hook.ctx["before"]

    names = [("hook_resid_post", "hook_out"), ("hook_B_bar",) * 2, ("hook_h_start",) * 2, ("hook_h.3",) * 2]
    hooks = [
        (f"blocks.{i}.{name}", fn)
        for i in (0, 1)
        for pair in names
        for name, fn in zip(pair, (keep, undo), strict=True)
    ]
    with hooked.hooks(fwd_hooks=hooks):
        close(hooked(IDS), peer())
        close(hooked(IDS), peer())
    assert sorted(met) == sorted(2 * [name for name, fn in hooks if fn is undo])
    point = HookPoint("blocks.0.hook_y")
    assert point == HookPoint("blocks.0.hook_y", {"other": 1}) and hash(point) and repr(point).endswith("hook_y')")


def test_hooks_run_in_the_order_given():
    add, double = (lambda v, hook: v + 1), (lambda v, hook: v * 2)
    for name in ("blocks.0.hook_y", "blocks.0.hook_B_bar", "blocks.0.hook_h_start"):
        _, cache = HookedMamba(MODEL_).run_with_cache(IDS, fwd_hooks=[(name, add), (name, double)], names_filter=name)
        clean = HookedMamba(MODEL_).run_with_cache(IDS, names_filter=name)[1][name]
        close(cache[name], 2 * (clean + 1))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_the_same_hook(alias):
    hooked = HookedMamba(MODEL_)
    with torch.no_grad():
        one = hooked.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.{alias}", bend)])
        close(one, peer((f"blocks.1.{ALIASES[alias]}", bend)))
        _, cache = hooked.run_with_cache(IDS)
        by_name = hooked.run_with_cache(IDS, names_filter=f"blocks.1.{alias}")[1]
    assert list(by_name) == [f"blocks.1.{alias}"]
    for name in (alias, ALIASES[alias], *(a for a in ALIASES if ALIASES[a] == ALIASES[alias])):
        assert f"blocks.1.{name}" in by_name and f"blocks.0.{name}" not in by_name
        close(by_name[f"blocks.1.{name}"], cache[f"blocks.1.{alias}"])
    assert torch.equal(cache[f"blocks.1.{alias}"], cache[f"blocks.1.{ALIASES[alias]}"])


def test_the_cache_answers_to_shortcuts():
    _, cache = HookedMamba(MODEL_).run_with_cache(IDS)
    assert torch.equal(cache["resid_pre", 2], cache["blocks.2.hook_resid_pre"])
    assert torch.equal(cache["h.4", -1], cache["blocks.2.hook_h.4"]) and torch.equal(
        cache["embed"], cache["hook_embed"]
    )
    assert "blocks.0.hook_y" in cache and ("y", 0) in cache and "nothing" not in cache and 3 not in cache
    assert "blocks.0.mixer.hook_ssm_state" not in cache and "hook_embed" in repr(cache)
    cache["hook_embed"].zero_()
    assert cache["hook_embed"].any()
    with pytest.raises(NotRecorded, match=r"'blocks.0.hook_yy' is not in this cache.*'blocks.0.hook_y'"):
        cache["blocks.0.hook_yy"]
    one = HookedMamba(MODEL_).run_with_cache(
        IDS[:1], names_filter=["hook_norm", "blocks.1.hook_A"], remove_batch_dim=True
    )
    assert one[1]["hook_norm"].shape == (L, 12) and one[1]["A", 1].shape == (24, 5)
    with pytest.raises(InputError, match="2 rows"):
        HookedMamba(MODEL_).run_with_cache(IDS, remove_batch_dim=True)


def test_losses():
    model = HookedMamba(MODEL_)
    logits = model(IDS)
    each = -logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    close(model(IDS, return_type="loss"), each.mean())
    close(model(IDS, return_type="loss", loss_per_token=True), each)
    both = model(IDS, return_type="both")
    assert torch.equal(both[0], logits) and both[1].shape == () and model(IDS, return_type=None) is None
    with pytest.raises(InputError, match="return_type='x'"):
        model(IDS, return_type="x")


def test_gradients_flow_through_hooks():
    value = torch.zeros(B, 24, 5, dtype=torch.float64, requires_grad=True)
    hook = ("blocks.1.hook_h.2", lambda h, hook: h + value)
    HookedMamba(MODEL_).run_with_hooks(IDS, fwd_hooks=[hook])[:, -1, 3].sum().backward()
    place = at.ssm_state(layer=1, pos=2)
    close(value.grad, gradients(MODEL_, IDS, lambda logits: logits[:, -1, 3], [place])[place])


@torch.no_grad()
def test_hooks_for_a_while():
    model = HookedMamba(MODEL_)
    hooks = [("blocks.0.hook_y", bend)]
    with model.hooks(fwd_hooks=hooks) as same:
        assert same is model
        close(model(IDS), peer(hooks))
        more = ("blocks.1.hook_delta", bend)
        close(model.run_with_hooks(IDS, fwd_hooks=[more]), peer([*hooks, more]))
        _, cache = model.run_with_cache(IDS, names_filter="blocks.0.hook_y")
    truth = {}
    peer(hooks, cache=truth)
    close(cache["y", 0], truth["blocks.0.hook_y"])
    close(model(IDS), peer())
    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=hooks):
        raise ZeroDivisionError
    close(model(IDS), peer())
    with pytest.raises(NotReached, match="no hook fired"), model.hooks(fwd_hooks=hooks):
        pass

    def stop(value, hook):
        raise ZeroDivisionError

    for name in ("blocks.0.hook_y", "blocks.0.hook_h_start"):
        with model.hooks(fwd_hooks=[(name, stop)]), pytest.raises(ZeroDivisionError):
            model(IDS)  # a hook may end a run that its caller needs no further


def test_nothing_is_registered_on_the_model():
    before = {k: v.clone() for k, v in MODEL_.state_dict().items()}
    HookedMamba(MODEL_).run_with_cache(IDS, fwd_hooks=[("blocks.0.hook_layer_input", bend)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in MODEL_.modules())
    assert all(torch.equal(v, MODEL_.state_dict()[k]) for k, v in before.items())


def test_float32():
    model = HookedMamba(tiny(seed=4, dtype=torch.float32))
    with torch.no_grad():
        hooks = [
            (f"blocks.{i}.{n}", bend) for i in range(3) for n in ("hook_A_bar", "hook_delta_2", "hook_layer_input")
        ]
        out, cache = model.run_with_cache(IDS, fwd_hooks=hooks, names_filter=lambda n: True)
        truth = {}
        torch.testing.assert_close(out.double(), peer(hooks, cache=truth), rtol=2e-4, atol=2e-4)
    for name in cache:
        torch.testing.assert_close(cache[name].double(), truth[name], rtol=2e-3, atol=2e-3)


# -- what is refused --------------------------------------------------------------------------------------------------

WRONG = {
    "blocks.1.hook_resid_prE": (UnknownSiteError, "Did you mean 'blocks.1.hook_resid_pre'"),
    "blocks.3.hook_y": (AddressError, r"blocks 0\.\.2"),
    "blocks.1.hook_h.7": (AddressError, r"positions 0\.\.6"),
    "blocks.1.hook_h": (UnknownSiteError, r"hook_h\.0"),
    "blocks.1.mixer.hook_in_proj": (UnknownSiteError, "hook_in_proj .x. and hook_skip"),
    "ssm_state": (UnknownSiteError, "no hook 'ssm_state'"),
    "blocks.-1.hook_y": (UnknownSiteError, "no hook"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_does_not_exist_raises(name):
    error, text = WRONG[name]
    hooked = HookedMamba(MODEL_)
    for call in (
        lambda: hooked.run_with_hooks(IDS, fwd_hooks=[(name, bend)]),
        lambda: hooked.run_with_cache(IDS, names_filter=[name]),
        lambda: hooked.run_with_cache(IDS, names_filter=name),
    ):
        with pytest.raises(error, match=text):
            call()


def test_a_hook_that_matches_nothing_raises():
    hooked = HookedMamba(MODEL_)
    for nothing in (lambda n: "attn" in n, lambda n: n.endswith("mixer.hook_out")):
        with pytest.raises(NotReached, match="matches none of the"):
            hooked.run_with_hooks(IDS, fwd_hooks=[(nothing, bend)])
        with pytest.raises(NotReached, match="matches none of the"):
            hooked.run_with_cache(IDS, names_filter=nothing)


def test_what_has_no_meaning_raises():
    hooked = HookedMamba(MODEL_)
    with pytest.raises(EditError, match="is a parameter"):
        hooked.run_with_hooks(IDS, fwd_hooks=[("blocks.0.hook_A", bend)])
    for name in ("blocks.0.hook_y", "blocks.0.hook_h.1", "blocks.0.hook_B_bar", "blocks.0.hook_h_start"):
        for bad in (lambda v, hook: v[:1], lambda v, hook: 3, lambda v, hook: v.long()):
            with pytest.raises(EditError, match=f"the hook on {name} must return shape"):
                hooked.run_with_hooks(IDS, fwd_hooks=[(name, bad)])
    with pytest.raises(EditError, match="both replace"):
        hooked.run_with_hooks(IDS, fwd_hooks=[("blocks.0.hook_B_bar", bend), ("blocks.0.mixer.hook_ssm_write", bend)])
    for call in (hooked.run_with_hooks, hooked.run_with_cache):
        with pytest.raises(InputError, match=r"interp\.gradients"):
            call(IDS, bwd_hooks=[("blocks.0.hook_y", bend)])
    with pytest.raises(InputError, match=r"interp\.gradients"):
        hooked.run_with_cache(IDS, incl_bwd=True)
    for name in ("add_hook", "reset_hooks", "generate"):
        with pytest.raises(UnknownSiteError, match=f"no {name}: use"):
            getattr(hooked, name)
    with pytest.raises(AttributeError, match="no attribute 'blocks'"):
        _ = hooked.blocks


NO_HOOKS = [
    ("blocks.0.hook_y", bend), [("blocks.0.hook_y", None)], [("blocks.0.hook_y", bend, bend)], ["blocks.0.hook_y"],
    [(3, bend)], {"blocks.0.hook_y": bend}, bend, None,
]  # fmt: skip


@pytest.mark.parametrize("wrong", NO_HOOKS)
def test_what_is_no_list_of_hooks_raises(wrong):
    hooked = HookedMamba(MODEL_)
    for call in (hooked.run_with_hooks, hooked.run_with_cache):
        with pytest.raises(InputError, match=r"fwd_hooks holds .*give a list of pairs, \[\(name, fn\), \.\.\.\]"):
            call(IDS, fwd_hooks=wrong)
    with pytest.raises(InputError, match="fwd_hooks holds"), hooked.hooks(fwd_hooks=wrong):
        pass
    with torch.no_grad():
        once = (hook for hook in [("blocks.0.hook_y", bend)])
        close(hooked.run_with_hooks(IDS, fwd_hooks=once), peer(("blocks.0.hook_y", bend)))


def test_what_is_no_key_and_no_row_raises():
    _, cache = HookedMamba(MODEL_).run_with_cache(IDS)
    for wrong in (("resid_post", 0, "x"), ("resid_post", "x"), ("resid_post",), (0, "resid_post"), 3, None):
        with pytest.raises(NotRecorded, match="is no key of a cache: a hook's name, or"):
            cache[wrong]
        assert wrong not in cache
    assert torch.equal(cache["y", torch.tensor(-1)], cache["y", 2])
    hooked = HookedMamba(MODEL_, Words())
    for call in (hooked.to_string, hooked.to_str_tokens):
        for several in (IDS, IDS.tolist(), IDS[:1, None]):
            with pytest.raises(InputError, match=r"have shape \(\d, .*one row of them, tokens\[i\]"):
                call(several)
        with pytest.raises(InputError, match="neither text nor a rectangular array of token ids"):
            call([[1, 2], [3]])
    for one in ([5], [[5]], torch.tensor(5)):
        assert hooked.to_string(one) == "5" and hooked.to_str_tokens(one) == ["5"]
    with pytest.raises(InputError, match="neither text nor a rectangular array"):
        hooked([[1, 2], [3]])


def test_the_table_is_whole():
    """Every name is a site, derived, a parameter, the start or refused, and every address is that of its site."""
    c = MODEL_.config
    for name, site in MODEL.items():
        assert address(name, c) == getattr(at, site)()
    for name, site in BLOCK.items():
        assert address(f"blocks.2.{name}", c) == getattr(at, site)(layer=2)
    for name in (*DERIVED, "hook_A", "hook_h_start"):
        with pytest.raises(UnknownSiteError, match="is no site; nearest is"):
            address(f"blocks.0.{name}", c)
    for name in REFUSED:
        with pytest.raises(MambascopeError, match="is not offered here"):
            address(f"blocks.0.{name}", c)
