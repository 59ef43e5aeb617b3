"""Generation of so many tokens, that stops, goes on from a memory, draws from few: each row is one pass over it."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny
from torch.testing import assert_close

from interp import Add, Mean, Scale, Zero, at, generate, run
from interp.generation import _Choice
from kernels_bridge.backends import BACKENDS
from minimal_mamba.errors import InputError, NotReached

MODEL = tiny(seed=9)
CONFIG = MODEL.config
VOCAB = CONFIG.vocab_size
IDS = torch.randint(0, 29, (5, 8), generator=torch.Generator().manual_seed(0))
LENGTHS = [8, 3, 5, 8, 6]
HERE = ["reference", *(n for n in ("torch", "compiled") if not BACKENDS[n].missing(torch.device("cpu")))]
ALL = pytest.mark.parametrize("backend", HERE)
NEW = 7
EDITS = [
    Add(at.resid_post(layer=0, pos=slice(2, None)), 0.4),
    Scale(at.ssm_state(layer=1, pos=slice(1, None, 2)), 1.3),
    Add(at.conv_state(layer=2, pos=slice(2, None)), torch.linspace(-1, 1, 72).reshape(24, 3)),
    Zero(at.u(layer=2, pos=[1, 2])),
]
RECORD = [
    at.ssm_state(layer=2, pos=slice(2, None)),
    at.y(layer=0, pos=1),
    at.resid_post(layer=1, pos=slice(0, None, 3)),
]


def stopping(ids, lengths):
    """Tokens with which some rows stop, at different times, and how many new ones each row then has."""
    new = torch.stack([row[n : n + NEW] for row, n in zip(ids, lengths, strict=True)])
    for stop in new.unique().tolist():
        count = [row.index(stop) + 1 if stop in row else NEW for row in new.tolist()]
        if len({*count}) >= 3 and max(count) == NEW:
            return stop, count
    raise AssertionError(f"no token stops rows at three times: {new}")


@ALL
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_row_that_stops_is_one_pass_over_what_it_came_to_and_the_others_go_on(backend, last_only, temperature):
    given = {
        "edits": EDITS, "lengths": LENGTHS, "backend": backend, "last_only": last_only, "temperature": temperature,
        "seed": 3,
    }  # fmt: skip
    free = generate(MODEL, IDS, NEW, record=RECORD, **given)
    stop, count = stopping(free.ids, LENGTHS)
    out = generate(MODEL, IDS, NEW, record=RECORD, stop=stop, **given)
    assert out.lengths.tolist() == [n + c for n, c in zip(LENGTHS, count, strict=True)]
    assert out.ids.shape == free.ids.shape and out.logits.shape == free.logits.shape
    for i, (m, c) in enumerate(zip(LENGTHS, count, strict=True)):
        assert torch.equal(out.ids[i, : m + c], free.ids[i, : m + c]) and not out.ids[i, m + c :].any()
        assert c == NEW or out.ids[i, m + c - 1] == stop
        real = slice(0, c if last_only else m + c - 1)
        assert_close(out.logits[i, real], free.logits[i, real], rtol=1e-13, atol=1e-13)
        assert not out.logits[i, real.stop :].any()
        assert torch.equal(out.last_logits[i], out.logits[i, real.stop - 1])
        with torch.no_grad():
            one = run(MODEL, out.ids[i : i + 1, : m + c - 1], EDITS, RECORD, backend, keep_state=True)
        assert_close(out.last_logits[i], one.last_logits[0], rtol=1e-9, atol=1e-10)
        for place in RECORD:
            whole, part = out[place][i], one[place][0]
            if not isinstance(place.pos, int):
                assert whole[len(part) :].isnan().all()
                whole = whole[: len(part)]
            assert_close(whole, part, rtol=1e-9, atol=1e-10)
        assert out.state.position[i] == m + c - 1
        for name in ("ssm_state", "conv_state"):
            for a, b in zip(getattr(out.state, name), getattr(one.state, name), strict=True):
                assert_close(a[i], b[0], rtol=1e-9, atol=1e-10)


@ALL
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_without_edits_the_rows_that_go_on_have_the_same_bits(backend, temperature):
    given = {"lengths": LENGTHS, "backend": backend, "temperature": temperature, "seed": 3}
    free = generate(MODEL, IDS, NEW, **given)
    stop, count = stopping(free.ids, LENGTHS)
    out = generate(MODEL, IDS, NEW, stop=stop, **given)
    for i, (m, c) in enumerate(zip(LENGTHS, count, strict=True)):
        assert torch.equal(out.ids[i, : m + c], free.ids[i, : m + c])
        assert torch.equal(out.logits[i, : m + c - 1], free.logits[i, : m + c - 1])
        if c == NEW:
            assert all(torch.equal(a[i], b[i]) for a, b in zip(out.state.ssm_state, free.state.ssm_state, strict=True))


@ALL
def test_where_all_rows_stop_nothing_more_is_run(backend):
    free = generate(MODEL, IDS, NEW, lengths=LENGTHS, backend=backend)
    first = free.ids[torch.arange(5), torch.tensor(LENGTHS)]
    out = generate(MODEL, IDS, NEW, [Add(at.u(layer=0), 0.0)], [at.y(layer=1)], backend, LENGTHS, stop=first.tolist())
    assert out.ids.shape == (5, 9) and out.logits.shape[1] == 8 and out.lengths.tolist() == [n + 1 for n in LENGTHS]
    assert out[at.y(layer=1)].shape[1] == 8 and out.state.position.tolist() == LENGTHS
    one = generate(MODEL, IDS, NEW, backend=backend, stop=int(generate(MODEL, IDS, 1).ids[0, -1]), lengths=None)
    assert one.lengths[0] == 9


@ALL
def test_a_mean_over_the_batch_is_over_the_rows_that_are_left(backend):
    edit = Mean(at.resid_post(layer=0, pos=slice(4, None)))
    for seed in range(50):
        given = {"temperature": 1.5, "seed": seed, "backend": backend}
        free = generate(MODEL, IDS, 5, edit, **given)
        out = generate(MODEL, IDS, 5, edit, stop=[2, 5, 11], **given)
        if len({*out.lengths.tolist()}) >= 3:
            break
    sizes = out.lengths - 1
    with torch.no_grad():
        whole = run(MODEL, out.ids[:, : int(sizes.max())], edit, lengths=sizes, backend=backend)
    assert_close(out.logits, whole.logits, rtol=1e-9, atol=1e-10)
    assert not torch.equal(out.ids, free.ids)


def test_what_a_stopped_row_does_not_reach_raises():
    free = generate(MODEL, IDS, NEW, temperature=1.5, seed=3)
    stop, count = stopping(free.ids, [8] * 5)
    short = min(range(5), key=count.__getitem__)
    end = 8 + count[short] - 1
    given = {"temperature": 1.5, "seed": 3, "stop": stop}
    text = rf"row {short} stopped, and its last position is {end - 1}; it has no position {end}\. Give a slice"
    for place in (at.u(layer=0, pos=end), at.ssm_state(layer=1, pos=[2, end]), at.y(layer=0, pos=slice(end, None))):
        with pytest.raises(NotReached, match=text):
            generate(MODEL, IDS, NEW, Add(place, 0.0), **given)
        with pytest.raises(NotReached, match=text):
            generate(MODEL, IDS, NEW, record=place, **given)
        longest = [count.index(NEW)]
        assert torch.equal(
            generate(MODEL, IDS, NEW, Add(place, 0.0, rows=longest), **given).lengths - 8, torch.tensor(count)
        )
    # a row that a mean is only taken of need not be there
    means = Mean(at.u(layer=0, pos=end), rows=longest)
    others = [i for i in range(5) if count[i] > count[short]]
    out, changed = (generate(MODEL, IDS, NEW, e, at.u(layer=0), **given) for e in ((), means))
    whole, part = out[at.u(layer=0)], changed[at.u(layer=0)]
    assert len(others) > 1
    assert_close(part[longest[0], end], whole[others, end].mean(0), rtol=1e-9, atol=1e-10)


@ALL
@pytest.mark.parametrize("ends", [(), 3])
def test_to_go_on_from_a_memory_is_to_have_gone_on(backend, ends):
    """From a run's memory, and from what generation left; at the same absolute positions."""
    whole = generate(MODEL, IDS, 9, EDITS, [at.y(layer=1)], backend, LENGTHS, stop=ends)
    first = generate(MODEL, IDS, 4, EDITS, [], backend, LENGTHS, stop=ends)
    rows = torch.arange(5)
    going = (first.lengths - torch.tensor(LENGTHS) == 4) & (first.ids[rows, first.lengths - 1] != (ends or -1))
    assert going.sum() >= 2
    last = first.ids[rows, first.lengths - 1][:, None]
    later = [e for e in EDITS if not isinstance(e, Zero)]  # of positions that are past
    second = generate(MODEL, last, 5, later, [at.y(layer=1)], backend, state=first.state, stop=ends)
    for i in going.nonzero()[:, 0].tolist():
        n = int(whole.lengths[i])
        joined = torch.cat([first.ids[i, : first.lengths[i]], second.ids[i, 1 : second.lengths[i]]])
        assert torch.equal(joined, whole.ids[i, :n])
        start, m = LENGTHS[i] + 3, int(second.lengths[i]) - 1
        assert_close(second.logits[i, :m], whole.logits[i, start : start + m], rtol=1e-9, atol=1e-10)
        assert_close(second[at.y(layer=1)][i, :m], whole[at.y(layer=1)][i, start : start + m], rtol=1e-9, atol=1e-10)
        assert second.state.position[i] == whole.state.position[i]
    state = run(MODEL, IDS[:, :5], keep_state=True, backend=backend).state
    place = at.u(layer=0, pos=slice(-1, None))  # from the last token of this prompt on
    went = generate(MODEL, IDS[:, 5:], 3, Scale(place, 2.0), backend=backend, state=state)
    want = generate(MODEL, IDS, 3, Scale(place, 2.0), backend=backend)
    assert torch.equal(went.ids[:, 3:], want.ids[:, 8:])
    assert_close(went.last_logits, want.last_logits, rtol=1e-9, atol=1e-10)


def test_few_are_drawn_from_as_transformers_does():
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.randn(40, 29, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((1, 1.0), (4, 1.0), (None, 0.9), (None, 0.3), (6, 0.7), (100, 1e-9)):
        want = scores
        if top_k is not None:
            want = processors.TopKLogitsWarper(top_k)(None, want)
        if top_p < 1:
            want = processors.TopPLogitsWarper(top_p)(None, want)
        found = _Choice(29, 1.0, 0, top_k, top_p, torch.device("cpu")).narrowed(scores)
        assert torch.equal(found, want)
    even = torch.zeros(1, 8)  # of equal shares as many as make up top_p, and not one more
    for top_p, count in ((0.5, 4), (0.25, 2), (0.26, 3)):
        for found in (
            _Choice(8, 1.0, 0, None, top_p, torch.device("cpu")).narrowed(even),
            processors.TopPLogitsWarper(top_p)(None, even),
        ):
            assert found.isfinite().sum() == count
    for hot, given in ((2.0, {"top_k": 3}), (2.0, {"top_p": 0.4}), (0.7, {"top_k": 5, "top_p": 0.6})):
        many = generate(MODEL, IDS[:1].expand(4000, -1), 1, temperature=hot, seed=5, **given)
        share = torch.bincount(many.ids[:, -1], minlength=VOCAB) / 4000
        at_heat = many.logits[:1, -1, :VOCAB].float() / hot
        p = _Choice(VOCAB, hot, 0, given.get("top_k"), given.get("top_p", 1.0), at_heat.device).narrowed(at_heat)
        p = p.softmax(-1)[0]
        assert not share[p == 0].any() and (p == 0).sum() > 15
        assert (share - p).abs().max() < 0.035
    one = generate(MODEL, IDS, 9, temperature=2.0, top_k=1).ids
    assert torch.equal(one, generate(MODEL, IDS, 9).ids)


def test_bad_choices_say_what_to_do():
    for given, text in (
        ({"top_k": 0}, r"top_k=0: an int of at least 1"),
        ({"top_k": True}, r"top_k=True: an int of at least 1"),
        ({"top_k": 2.0}, r"top_k=2\.0: an int of at least 1"),
        ({"top_p": 0}, r"top_p=0: a share, above 0 and up to 1"),
        ({"top_p": float("nan")}, r"top_p=nan: a share"),
        ({"top_p": "a"}, r"top_p='a': a share"),
        ({"temperature": 0, "top_k": 4}, r"top_k=4, .* with temperature=0, .* give a temperature to draw with"),
        ({"temperature": 0, "top_p": 0.5}, r"top_p=0\.5 with temperature=0"),
        ({"stop": None}, r"stop=None: a token id, or several; \(\) for none"),
        ({"stop": 2.0}, r"stop=2\.0: a token id"),
        ({"stop": True}, r"stop=True: a token id"),
        ({"stop": [3, False]}, r"stop=\[3, False\]: a token id"),
        ({"stop": [1, "a"]}, r"stop=\[1, 'a'\]: a token id"),
        ({"stop": [3, 29]}, r"stop=29 is outside the vocabulary 0\.\.28: no row would ever end with it"),
        ({"stop": -1}, r"stop=-1 is outside the vocabulary"),
        ({"state": 3}, r"state is a int; give run_\.state"),
    ):
        with pytest.raises(InputError, match=text):
            generate(MODEL, IDS, 2, **{"temperature": 1.0} | given)
    for bad, to in ((math.inf, [3]), (-math.inf, slice(None))):  # of which nothing can be drawn
        value = torch.zeros(MODEL.config.padded_vocab, dtype=torch.float64)
        value[to] = bad
        edit = Add(at.logits(pos=slice(8, None)), value, rows=[2])
        with pytest.raises(InputError, match=r"row 2 hold inf, or nothing but -inf, where new token 1 is chosen"):
            generate(MODEL, IDS, 2, edit, temperature=1.0)
    generate(MODEL, IDS, 2, stop=torch.tensor([3, 4]))
    generate(MODEL, IDS, 2, stop=torch.tensor(3))


# -- for a number of tokens -------------------------------------------------------------------------------------------


def close(a, b, tol=1e-11):
    assert_close(a, b, rtol=tol, atol=tol)


PROMPTS = torch.randint(0, 29, (3, 8), generator=torch.Generator().manual_seed(0))
EDITED = [
    Add(at.ssm_state(layer=1, pos=[1, -1]), 0.8),
    Scale(at.state_read(layer=2, pos=slice(-1, None)), 1.6),
    Add(at.recurrent_state(layer=0, pos=slice(2, None, 3)), 0.3),
    Scale(at.resid_post(layer=1, pos=slice(-2, None)), 0.7),
]


@ALL
def test_generation_is_one_pass_under_the_same_edits(backend):
    """Also with ragged prompts; each row is what it is alone."""
    n, lengths = 5, [8, 3, 5]
    keep = [at.ssm_state(layer=2, pos=3), at.y(layer=0, pos=slice(-1, None))]
    junk = PROMPTS.clone()
    junk[1, 3:], junk[2, 5:] = 28, 28
    out = generate(MODEL, junk, n, EDITED, record=keep, lengths=lengths, backend=backend)
    assert out.lengths.tolist() == [m + n for m in lengths]
    assert out.logits.shape[:2] == (3, 8 + n - 1)
    for i, m in enumerate(lengths):
        assert torch.equal(out.ids[i, :m], PROMPTS[i, :m])
        assert not out.ids[i, m + n :].any()
        # one pass over the row, with the prompt's end written as a number from the start
        place = [
            at.ssm_state(layer=1, pos=[1, m - 1]),
            at.state_read(layer=2, pos=slice(m - 1, None)),
            at.recurrent_state(layer=0, pos=slice(2, None, 3)),
            at.resid_post(layer=1, pos=slice(m - 2, None)),
        ]
        edits = [Add(place[0], 0.8), Scale(place[1], 1.6), Add(place[2], 0.3), Scale(place[3], 0.7)]
        whole = out.ids[i : i + 1, : m + n - 1]
        with torch.no_grad():
            one = run(
                MODEL,
                whole,
                edits,
                record=[keep[0], at.y(layer=0, pos=slice(m - 1, None))],
                backend=backend,
                keep_state=True,
            )
        close(out.logits[i, : m + n - 1], one.logits[0])
        assert not out.logits[i, m + n - 1 :].any()
        close(out.last_logits[i], one.logits[0, -1])
        close(out[keep[0]][i], one[keep[0]][0])
        close(out[keep[1]][i], one[at.y(layer=0, pos=slice(m - 1, None))][0])
        assert torch.equal(out.ids[i, m : m + n], one.logits[0, m - 1 :, : CONFIG.vocab_size].argmax(-1))
        for a, b in zip(out.state.ssm_state, one.state.ssm_state, strict=True):
            close(a[i], b[0])
        assert out.state.position[i] == m + n - 1
    plain = generate(MODEL, junk, n, lengths=lengths, backend=backend)
    assert (plain.logits - out.logits).abs().max() > 1e-2


@ALL
def test_last_only_generation(backend):
    lengths = [8, 2, 5]
    full = generate(MODEL, PROMPTS, 4, lengths=lengths, backend=backend)
    last = generate(MODEL, PROMPTS, 4, lengths=lengths, backend=backend, last_only=True)
    assert torch.equal(full.ids, last.ids)
    assert last.logits.shape == (3, 4, CONFIG.padded_vocab)
    for i, m in enumerate(lengths):
        close(last.logits[i], full.logits[i, m - 1 : m + 3])
    close(last.last_logits, full.last_logits)
    one = generate(MODEL, PROMPTS, 1, lengths=lengths, backend=backend)
    close(one.last_logits, torch.stack([full.logits[i, m - 1] for i, m in enumerate(lengths)]))


def test_the_vocabularys_padding_is_never_chosen():
    assert CONFIG.padded_vocab > CONFIG.vocab_size
    tempting = Add(at.logits(v=slice(CONFIG.vocab_size, None)), 1e3)
    for temperature in (0.0, 1.0):
        out = generate(MODEL, PROMPTS, 6, [tempting], temperature=temperature)
        assert int(out.ids.max()) < CONFIG.vocab_size
        assert int(out.logits.argmax(-1).min()) >= CONFIG.vocab_size  # the temptation was there
    same = generate(MODEL, PROMPTS, 6)
    assert torch.equal(generate(MODEL, PROMPTS, 6, [tempting]).ids, same.ids)


def test_sampling_is_seeded_and_follows_the_temperature():
    a, b, c = (generate(MODEL, PROMPTS, 12, temperature=1.5, seed=s).ids for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    greedy = generate(MODEL, PROMPTS, 12).ids
    assert not torch.equal(a, greedy)
    for cold in (1e-4, 1e-40, 1e-45, 1e-300):
        assert torch.equal(generate(MODEL, PROMPTS, 12, temperature=cold, seed=3).ids, greedy)
    generate(MODEL, PROMPTS, 1, temperature=np.float32(1), seed=2**64 - 1)
    generate(MODEL, PROMPTS, 1, temperature=1, seed=np.int64(1))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    generate(MODEL, PROMPTS, 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    many = generate(MODEL, PROMPTS[:1].expand(4000, -1), 1, temperature=2.0, seed=5)
    share = torch.bincount(many.ids[:, -1], minlength=CONFIG.vocab_size) / 4000
    p = (many.logits[0, -1, : CONFIG.vocab_size] / 2).softmax(-1)
    assert (share - p).abs().max() < 0.035


def test_bad_requests_of_generation():
    with pytest.raises(InputError, match="n_tokens=0: at least 1"):
        generate(MODEL, PROMPTS, 0)
    for wrong in (2.0, True, "2", None):
        with pytest.raises(InputError, match=r"n_tokens=.*: at least 1, an int"):
            generate(MODEL, PROMPTS, wrong)
    assert torch.equal(generate(MODEL, PROMPTS, np.int64(2)).ids, generate(MODEL, PROMPTS, 2).ids)
    with pytest.raises(InputError, match=r"temperature=nan"):
        generate(MODEL, PROMPTS, 1, temperature=float("nan"))
    with pytest.raises(InputError, match=r"temperature=-1.0: a finite number, 0 \(the likeliest token\) or more"):
        generate(MODEL, PROMPTS, 1, temperature=-1.0)
    for wrong in (float("inf"), "1", None, True, 1j):
        with pytest.raises(InputError, match=r"temperature=.*: a finite number, 0"):
            generate(MODEL, PROMPTS, 1, temperature=wrong)
    for wrong in (1.0, "1", None, True, 2**64, -(2**63) - 1):
        with pytest.raises(InputError, match=r"seed=.*: an int of 64 bits"):
            generate(MODEL, PROMPTS, 1, temperature=1.0, seed=wrong)
