"""Tuned lens: a planted map is found, its scores are those of whole runs, and what is held out is not fitted."""

from dataclasses import fields, replace

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import draw, near, tiny
from torch.nn import functional as F

from interp import Scale, TunedLens, at, lens_curve, logit_lens, run, tuned_lens
from minimal_mamba.errors import CheckpointError, InputError

QUIET = {"progress": False, "epochs": 3}


def ids(l, b=12, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


def affine(tap, size=0.5):
    """A layer whose output is affine in what one token of the conv's window embeds.

    Every embedding is of one length, so that the norm divides by one number; the gate is one number, SiLU is the
    identity at 20 and above, and nothing is read from the state.

    Args:
        tap: which token, -1 the own. size: of the output beside the stream.
    """
    model = tiny(n_layer=1, bias=True, d_model=6, vocab_size=101)
    mixer, e, v = model.backbone.layers[0].mixer, model.config.d_inner, model.config.padded_vocab
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(F.normalize(draw(v, 6, seed=1), dim=-1) * 6**0.5)
        model.lm_head.weight.copy_(draw(v, 6, seed=2))
        mixer.in_proj.weight[e:] = 0
        mixer.in_proj.bias[:e], mixer.in_proj.bias[e:] = 0.0, 1.0
        mixer.conv1d.weight.zero_()[:, 0, tap] = 1
        mixer.conv1d.bias.fill_(20.0)
        mixer.x_proj.weight.zero_()
        mixer.D.fill_(1.0)
        mixer.out_proj.weight.copy_(size * draw(6, e, seed=3) / e**0.5)
        mixer.out_proj.bias.copy_(draw(6, seed=4) - mixer.out_proj.weight.sum(1) * 20 * F.silu(torch.tensor(1.0)))
    return model


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def test_an_affine_map_is_found_and_holds_for_tokens_that_it_never_saw():
    model, each = affine(-1), torch.arange(101)[:, None]
    made = tuned_lens(model, each, batch=16, progress=False)
    assert made.tested.sum() == 20 and made.tuned.shape == made.plain.shape == (1, 20)
    assert 20 < len(made.losses) < 200 and made.constant.mean() > 0.8
    assert made.tuned.mean() < 0.03 and made.tuned.mean() < 0.01 * made.plain.mean()
    # the last norm gives every stream one length, so directions are all that a lens can be right about
    out = run(model, each, record=[at.resid_pre(layer=0), at.resid_post(layer=0)])
    before, behind = (out[a][made.tested, 0].detach() for a in out.records)
    assert F.cosine_similarity(made(before, 0), behind).mean() > 0.99 > 0.8 > F.cosine_similarity(before, behind).mean()


def test_of_a_stream_that_does_not_hold_the_answer_no_lens_says_more_than_the_constant():
    """The answer is the token before, which the layer is still to fetch."""
    tokens = ids(6, 300)
    made, own = (tuned_lens(affine(tap, 8.0), tokens, progress=False) for tap in (-2, -1))
    assert made.tuned.mean() > made.constant.mean() > 1
    assert own.tuned.mean() < 0.05 < 0.5 < own.constant.mean()


def test_the_stream_behind_the_last_layer_is_read_as_it_is():
    model, tokens = tiny(), ids(7)
    made, place = tuned_lens(model, tokens, **QUIET), at.resid_post(layer=2)
    last = run(model, tokens, record=[place])[place]
    assert torch.equal(made(last, 3), last) and not torch.equal(made(last, 2), last)


def test_it_comes_as_near_as_lbfgs():
    model, tokens = tiny(), ids(9, 40)
    made = tuned_lens(model, tokens, epochs=400, batch=64, learning_rate=0.03, progress=False)
    place = at.resid_pre(layer=1)
    out = run(model, tokens[~made.tested], record=[place])
    said, h = out.logits.detach()[..., :29].log_softmax(-1), out[place].detach()
    maps = torch.zeros(13, 12, dtype=torch.float64, requires_grad=True)
    best = torch.optim.LBFGS([maps], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss():
        best.zero_grad()
        found = model.lm_head(model.backbone.norm_f(h + h @ maps[:12] + maps[12]))[..., :29].log_softmax(-1)
        value = kl(said, found).mean()
        value.backward(inputs=[maps])
        return value

    best.step(loss)
    least = float(loss().detach())
    plain = logit_lens(model, tokens[~made.tested], log_probs=True)[1]
    assert least < 0.8 * kl(said, plain).mean()
    assert least - 1e-6 < made.fitted[1] < 1.03 * least


@pytest.mark.parametrize("lengths", [None, [7, 3, 5, 6] * 3])
@pytest.mark.parametrize("rms_norm", [True, False])
def test_the_scores_are_those_of_whole_runs(rms_norm, lengths):
    model, tokens = tiny(rms_norm=rms_norm), ids(7)
    made = tuned_lens(model, tokens, lengths=lengths, batch=9, **QUIET)
    sizes = lengths or [7] * 12
    rows = [logit_lens(model, tokens[i : i + 1, :n], lens=made, log_probs=True)[:, 0] for i, n in enumerate(sizes)]
    plain = [logit_lens(model, tokens[i : i + 1, :n], log_probs=True)[:, 0] for i, n in enumerate(sizes)]
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(rows, plain, strict=True))
    tested = made.tested.tolist()
    fitted = torch.cat([kl(r[-1], r[:-1]) for r, t in zip(rows, tested, strict=True) if not t], 1)
    near(made.fitted, fitted.mean(1))
    mean = torch.cat([r[-1].exp() for r, t in zip(rows, tested, strict=True) if not t]).mean(0).log()
    for name, values in (("tuned", rows), ("plain", plain)):
        want = [kl(r[-1], r[:-1]).mean(1) for r, t in zip(values, tested, strict=True) if t]
        near(getattr(made, name), torch.stack(want, 1))
    near(made.constant, torch.stack([kl(r[-1], mean).mean() for r, t in zip(rows, tested, strict=True) if t]))
    assert (made.losses[-1] < made.losses[0]).all() and made.losses.shape == (3, 3)


def test_it_reads_runs_under_edits_and_some_tokens_of_them():
    model, tokens, edit = tiny(), ids(7), Scale(at.ssm_state(layer=1, pos=3), 2.0)
    made = tuned_lens(model, tokens, **QUIET)
    places = [*(at.resid_pre(layer=i) for i in range(3)), at.resid_post(layer=2)]
    out = run(model, tokens, edit, places)
    by_hand = torch.stack([model.lm_head(model.backbone.norm_f(made(out[a], i))) for i, a in enumerate(places)])
    found = logit_lens(model, tokens, lens=made, edits=edit)
    near(found, by_hand)
    some = torch.tensor([[3], [5]]).expand(2, 12).T
    near(logit_lens(model, tokens, some, pos=-1, lens=made, edits=edit), by_hand[:, :, -1][..., [3, 5]])
    assert (found[1] - logit_lens(model, tokens, edits=edit)[1]).norm() > 0.01
    blank = replace(made, weight=0 * made.weight, bias=0 * made.bias)
    assert torch.equal(logit_lens(model, tokens, lens=blank), logit_lens(model, tokens))


def test_what_is_held_out_is_not_fitted():
    model, tokens, other = tiny(), ids(7), ids(7, seed=1)
    made = tuned_lens(model, tokens, groups=range(12), **QUIET)
    mixed = torch.where(made.tested[:, None], other, tokens)
    again = tuned_lens(model, mixed, groups=range(12), **QUIET)
    assert torch.equal(again.weight, made.weight) and torch.equal(again.fitted, made.fitted)
    assert not torch.equal(again.tuned, made.tuned)
    mixed = torch.where(made.tested[:, None], tokens, other)
    assert not torch.equal(tuned_lens(model, mixed, groups=range(12), **QUIET).weight, made.weight)
    doubled = tuned_lens(model, torch.cat([tokens, tokens]), **QUIET)
    assert torch.equal(doubled.tested[:12], doubled.tested[12:])
    longer = torch.cat([torch.cat([tokens, tokens]), ids(3, 24, seed=2)], 1)  # what pads them is no difference
    assert torch.equal(tuned_lens(model, longer, lengths=[7] * 24, **QUIET).tested, doubled.tested)


def test_it_is_the_same_each_time_and_leaves_the_model_alone():
    model, tokens = tiny(), ids(7)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    one = tuned_lens(model, tokens, **QUIET)
    with torch.inference_mode():
        inside, two = tuned_lens(tiny(), tokens, **QUIET), tuned_lens(model, tokens.tolist(), **QUIET)
    for other in (two, inside):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.tuned, other.tuned)
    assert not any(x.requires_grad for x in vars(one).values() if isinstance(x, torch.Tensor))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    for backend in ("reference", "torch"):
        near(tuned_lens(model, tokens, backend=backend, **QUIET).weight, one.weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    tokens = ids(7, 40)
    made, exact = (tuned_lens(m, tokens, **QUIET) for m in (tiny(dtype=dtype), tiny(dtype=dtype).double()))
    assert made.weight.dtype == torch.float32 and exact.weight.dtype == torch.float64
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(made.tuned, exact.tuned, rtol=bound, atol=bound)
    assert logit_lens(tiny(dtype=dtype), tokens, lens=made).dtype == dtype


def test_a_file_gives_back_what_was_saved(tmp_path):
    model, tokens, path = tiny(), ids(7), tmp_path / "lenses" / "tiny.safetensors"
    made = tuned_lens(model, tokens, **QUIET)
    made.save(path)
    for again in (TunedLens.load(path), TunedLens.load(str(path), model)):
        for f in fields(TunedLens):
            one, two = getattr(made, f.name), getattr(again, f.name)
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    with pytest.raises(CheckpointError, match="other weights"):
        TunedLens.load(path, tiny(seed=1))
    with pytest.raises(CheckpointError, match="holds no tuned lens"):
        TunedLens.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CheckpointError, match="holds no tuned lens"):
        TunedLens.load(tmp_path / "text")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no tuned lens of version 1"):
        TunedLens.load(tmp_path / "model" / "model.safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"batch": 0}, "batch=0"),
        ({"ids": ids(7, 1)}, "one group"),
        ({"groups": [0] * 12}, "one group"),
        ({"groups": [0]}, "1 groups for 12 rows"),
        ({"model": "mamba"}, "a str; give a Mamba"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_asked_is_said(change, says):
    with pytest.raises(InputError, match=says):
        tuned_lens(**{"model": tiny(), "ids": ids(7)} | QUIET | change)


def test_a_lens_of_other_sizes_is_refused():
    made = tuned_lens(tiny(), ids(7), **QUIET)
    with pytest.raises(InputError, match=r"lens is of \(3, 12\): give what .* for 2 layers of d_model 12"):
        logit_lens(tiny(n_layer=2), ids(7), lens=made)
    with pytest.raises(InputError, match="lens is a str"):
        logit_lens(tiny(), ids(7), lens="tuned")


def test_the_curve_shows_the_means_and_their_intervals():
    made = tuned_lens(tiny(), ids(7, 20), **QUIET)
    ax = lens_curve(made, title="tiny")
    drawn = {line.get_label(): line for line in ax.lines}
    for label, values in (("tuned lens", made.tuned), ("logit lens", made.plain)):
        assert drawn[label].get_ydata() == pytest.approx(values.mean(1).numpy())
        assert [*drawn[label].get_xdata()] == [0, 1, 2]
    assert drawn["mean distribution"].get_ydata()[0] == pytest.approx(float(made.constant.mean()))
    (band,) = [c for c in ax.collections if c.get_label() == "_tuned lens"]
    inside = band.get_paths()[0].vertices[:, 1]
    half = 1.96 * float(made.tuned[0].std() / made.tuned.shape[1] ** 0.5)
    assert any(inside == pytest.approx(float(made.tuned[0].mean()) + half) for inside in inside)
    assert ax.get_title() == "tiny" and "nats" in ax.get_ylabel()
    with pytest.raises(InputError, match="a list; give"):
        lens_curve([made])
    plt.close("all")
