"""Metrics against hand values."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny

from interp import Add, Scale, Zero, accuracy, at, generate, kl, log_prob, logit_diff, patch_grid, prob, run, sweep
from minimal_mamba.errors import InputError

ROWS = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)) + 2.0
HALF = torch.log(torch.full((2, 4), 0.25, dtype=torch.float64))


def near(value, wanted):
    assert value.shape == (len(wanted),)
    assert value.tolist() == pytest.approx(wanted, abs=1e-12)


def test_hand_values():
    near(logit_diff(ROWS, 0, 1), [math.log(2), math.log(0.5)])
    near(logit_diff(ROWS, torch.tensor([0, 3]), torch.tensor([1, 0])), [math.log(2), math.log(4)])
    near(log_prob(ROWS, 2), [math.log(0.125), math.log(0.3)])
    near(prob(ROWS, torch.tensor([1, 3])), [0.25, 0.4])
    near(accuracy(ROWS, 0), [1, 0])
    near(accuracy(ROWS, torch.tensor([1, 3])), [0, 1])
    near(accuracy(torch.tensor([[0.0, 2.0, 2.0]] * 2), torch.tensor([1, 2])), [1, 0])  # a tie
    near(
        kl(ROWS, HALF),
        [
            0.5 * math.log(2) + 0 + 0.25 * math.log(0.5),
            math.log(4) + sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)),
        ],
    )
    near(
        kl(HALF, ROWS),
        [0.25 * sum(math.log(0.25 / p) for p in row) for row in ((0.5, 0.25, 0.125, 0.125), (0.1, 0.2, 0.3, 0.4))],
    )
    near(kl(ROWS, ROWS + 5), [0, 0])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_tokens_are_any_integers(dtype):
    tokens = torch.tensor([1, 3]).to(getattr(torch, dtype))
    for given in (tokens, tokens.numpy()):
        near(prob(ROWS, given), [0.25, 0.4])
        near(log_prob(ROWS, given), [math.log(0.25), math.log(0.4)])
        near(logit_diff(ROWS, given, 0), [-math.log(2), math.log(4)])
        assert accuracy(ROWS, given).tolist() == [0, 1]


def test_logits_of_a_sequence_count_at_their_last_position():
    three = torch.stack([HALF, HALF * 3, ROWS], 1)
    for metric in (
        lambda x: logit_diff(x, 0, 1),
        lambda x: log_prob(x, 2),
        lambda x: prob(x, 3),
        lambda x: accuracy(x, 3),
    ):
        assert torch.equal(metric(three), metric(ROWS))
    assert torch.equal(kl(three, HALF), kl(ROWS, HALF))


def test_kl_is_never_negative():
    rng = torch.Generator().manual_seed(0)
    for scale in (0.01, 1, 30):
        p, q = (scale * torch.randn(200, 50, generator=rng, dtype=torch.float64) for _ in range(2))
        assert kl(p, q).min() >= 0
        assert kl(p, q).max() > 0


def test_16_bit_logits_are_read_in_32():
    low = ROWS.to(torch.bfloat16)
    assert log_prob(low, 1).dtype == torch.float32
    torch.testing.assert_close(log_prob(low, 1), low.float().log_softmax(-1)[:, 1])


def test_a_run_counts_each_rows_own_last_token():
    model = tiny()
    ids = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
    lengths = [2, 6, 4]
    with torch.no_grad():
        padded = run(model, ids, lengths=lengths)
        other = run(model, ids.flip(1), lengths=lengths)
        alone = [run(model, ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
        others = [run(model, ids.flip(1)[i : i + 1, :n]) for i, n in enumerate(lengths)]
    answer, foil = torch.tensor([1, 2, 3]), 7
    for metric, one in (
        (logit_diff(padded, answer, foil), lambda i: logit_diff(alone[i], answer[i], foil)),
        (prob(padded, answer), lambda i: prob(alone[i].logits[..., :29], int(answer[i]))),
        (kl(padded, other), lambda i: kl(alone[i], others[i].logits[..., :29])),
    ):
        torch.testing.assert_close(metric, torch.cat([one(i) for i in range(3)]), rtol=1e-10, atol=1e-12)
    for short in (padded.logits, padded.logits[:, -1], padded.logits[:, -1:], padded.logits[[0, 0, 2]]):
        with pytest.raises(InputError, match=r"row 0 are all zero at the last position, as on padding.* Pass the run"):
            logit_diff(short, answer, foil)
    assert torch.equal(logit_diff(padded.last_logits, answer, foil), logit_diff(padded, answer, foil))


def test_zeros_that_are_meant_are_taken():
    model = tiny()
    ids = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = run(model, ids, [Zero(at.final_norm())], lengths=[2, 6, 4], last_only=True)
        one = run(model, ids, [Zero(at.final_norm(), rows=[1])])
    assert not logit_diff(out, 1, 2).any() and not logit_diff(out.logits, 1, 2).any()
    assert logit_diff(one, 1, 2).ne(0).tolist() == [True, False, True]


@pytest.mark.parametrize("lengths", [None, [2, 4, 3]])
@pytest.mark.parametrize("site", ["embed", "resid_post", "final_norm"])
def test_zeros_of_a_cell_are_meant(site, lengths):
    """The stream of the last word zeroed makes its logits zero, beside others' that are not: each cell is its run."""
    model, ids = tiny(), torch.randint(0, 29, (3, 4), generator=torch.Generator().manual_seed(0))
    layer = {"layer": 2} if site == "resid_post" else {}
    where = {"source": "zero", "site": site, "positions": [-2, -1], "lengths": lengths, "progress": False}
    for metric in (lambda x: logit_diff(x, 1, 2), lambda x: log_prob(x, 1)):
        grid = patch_grid(model, ids, None, metric=metric, **where, layers=[2] if layer else None)
        for j, pos in enumerate((-2, -1)):
            with torch.no_grad():
                out = run(model, ids, Zero(getattr(at, site)(pos=pos, **layer)), lengths=lengths)
            assert bool(out.last_logits.any()) == (pos == -2)
            torch.testing.assert_close(grid.values[0, j], metric(out.last_logits), rtol=1e-10, atol=1e-12)
    padded = run(model, ids, lengths=[2, 4, 3]).logits
    with pytest.raises(InputError, match="row 0 are all zero"):  # what the sweep knew is not known here
        logit_diff(padded, 1, 2)
    for other in (padded, padded[:, -1]):  # nor of the base that a metric holds, whose short rows end in padding
        for metric in (lambda x, other=other: kl(x, other), lambda x, other=other: kl(other, x)):
            with pytest.raises(InputError, match="row 0 are all zero"):
                patch_grid(model, ids, None, metric=metric, **where, layers=[2] if layer else None)


def test_a_run_has_no_padding_in_its_vocabulary():
    """A token that does not exist has no probability and is no answer; in a tensor it counts, as documented."""
    model = tiny()
    ids = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = run(model, ids)
        out = run(model, ids, [Add(at.logits(v=slice(29, None)), 50.0)])
    assert out.vocab_size == 29 and out.logits.shape[-1] == 32
    best = out.last_logits[:, :29].argmax(-1)
    assert accuracy(out, best).tolist() == [1, 1, 1] and accuracy(out.logits, best).tolist() == [0, 0, 0]
    near(sum(prob(out, token) for token in range(29)), [1, 1, 1])
    assert prob(out.logits, best).max() < 1e-9
    near(kl(plain, out), [0, 0, 0])
    assert torch.equal(logit_diff(out, 1, 2), logit_diff(out.logits, 1, 2))
    with pytest.raises(InputError, match=r"token id 29 is outside the logits' 0\.\.28"):
        prob(out, 29)
    assert generate(model, ids, 2).vocab_size == 29


@pytest.mark.parametrize("lengths", [None, [6, 3, 5]])
def test_kl_of_a_metrics_logits_and_a_run_knows_the_padding_by_the_run(lengths):
    model = tiny()
    ids = torch.randint(0, 29, (3, 6), generator=torch.Generator().manual_seed(0))
    boost = Add(at.logits(v=slice(29, None)), 50.0)  # where the padding took part, it would be all there is
    cells = [[boost, Scale(at.y(layer=i), 0.3)] for i in range(3)]
    with torch.no_grad():
        base = run(model, ids, boost, lengths=lengths)
        found = sweep(model, ids, cells, lambda x: kl(x, base), lengths=lengths, progress=False).values
        back = sweep(model, ids, cells, lambda x: kl(base, x), lengths=lengths, progress=False).values
        for cell, forth, other in zip(cells, found, back, strict=True):
            last = run(model, ids, cell, lengths=lengths).last_logits[:, :29].double().numpy()
            p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (last, base.last_logits[:, :29].numpy()))
            near(forth, (p * np.log(p / q)).sum(-1))
            near(other, (q * np.log(q / p)).sum(-1))
            assert forth.min() > 1e-4
    near(kl(base.last_logits[:, :29], base), [0, 0, 0])  # cut already
    for wide in (30, 31, 33):
        with pytest.raises(InputError, match=rf"kl compares \(3, 29\) with \(3, {wide}\).*has the run's columns"):
            kl(base, torch.randn(3, wide))
    whole = run(tiny(vocab_size=32), ids)  # a vocabulary of its own, as wide as the other's with its padding
    for pair in ((base, whole), (whole, base)):
        with pytest.raises(InputError, match=r"kl compares \(3, (29|32)\) with \(3, (29|32)\)"):
            kl(*pair)


@pytest.mark.parametrize(
    "metric",
    [
        lambda t: log_prob(ROWS, t),
        lambda t: prob(ROWS, t),
        lambda t: accuracy(ROWS, t),
        lambda t: logit_diff(ROWS, t, 0),
        lambda t: logit_diff(ROWS, 0, t),
    ],
)
def test_bad_tokens(metric):
    for wrong, text in (
        (4, r"token id 4 is outside the logits' 0\.\.3"),
        (-1, r"token id -1 is outside the logits' 0\.\.3"),
        (torch.tensor([3, -2]), r"token id -2 is outside"),
        (torch.tensor([0, 1, 2]), r"tokens have shape \(3,\); give one id, or one a row \(2,\)"),
        (torch.tensor([[0], [1]]), r"tokens have shape \(2, 1\)"),
        (torch.tensor([0.0, 1.0]), "give one id"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            metric(wrong)
        assert isinstance(caught.value, ValueError)


def test_bad_logits():
    with pytest.raises(InputError, match=r"logits have shape \(4,\); a metric takes \(b, v\) or \(b, l, v\)"):
        prob(ROWS[0], 1)
