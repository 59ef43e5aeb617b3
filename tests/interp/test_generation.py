"""Generation that stops, goes on from a memory and draws from few: each row is one pass over what it came to."""

import math

import pytest
import torch
from helpers import tiny
from torch.testing import assert_close

from interp import Add, Mean, Scale, Zero, at, generate, run
from interp.generation import _Choice
from kernels_bridge.backends import BACKENDS
from minimal_mamba.errors import InputError, NotReached

MODEL = tiny(seed=9)
VOCAB = MODEL.config.vocab_size
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
