"""Alignment: planted subspaces are found, controls are at chance, and what comes back are exact edits."""

import itertools
import math
from functools import cache

import pytest
import torch
from helpers import draw

from analyses.planted.build import Bench
from interp import align, at, run

GAIN = 3.0  # of a right answer's logit over one that is wrong in one part: 2 GAIN


def ids(l, b=3, seed=0):
    return torch.randint(29, (b, l), generator=torch.Generator().manual_seed(seed))


@cache
def planted(seed=0):
    """Three bits, each along a direction of its own of a state; the answer names all three.

    A token writes an orthonormal direction of eight channels, of which three are read: the hidden value is the first
    two, and the third is to stay the base's. What else is written is never read.

    Returns:
        model, ids, donor_ids, targets (of the donor's first two bits and the base's third), place, directions (3, e)
    """
    bench, rate, l, b, level = Bench(seed), 0.05, 6, 300, 1.0
    layer, bits, others = bench.layer, bench.tokens[:6], bench.tokens[6:11]
    turn = torch.linalg.qr(draw(8, 8, seed=seed))[0]  # a direction a column
    writes = {bits[2 * i + 1]: turn[:, i] for i in range(3)} | {t: turn[:, 3 + i] for i, t in enumerate(others)}
    e = [
        bench.channel(
            layer, {t: level + (float(writes[t][c]) if t in writes else 0.0) for t in bench.tokens}, rate=rate
        )
        for c in range(8)
    ]
    always, n = bench.channel(layer, 1.0), bench.dimension(layer)
    bench.connect(layer, n, B={always: 0.1}, C={always: 10.0})
    model = bench.finish({})
    codes = torch.tensor(list(itertools.product((0, 1), repeat=3)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for i in range(3):
            model.backbone.layers[layer].mixer.out_proj.weight[bench.out[i], e] = turn[:, i]
            kept = math.exp(-rate * (l - 1 - i))
            same = level * float(turn[:, i].sum()) * sum(math.exp(-rate * t) for t in range(l))
            for token, code in zip(bench.tokens, codes.tolist(), strict=False):
                model.lm_head.weight[token, bench.out[i]] = 2 * GAIN * (2 * code[i] - 1) / kept
                model.lm_head.weight[token, bench.one] -= GAIN * (2 * code[i] - 1) * (1 + 2 * same / kept)
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, (2, b, 3), generator=rng)
    prompts = torch.tensor(others)[torch.randint(len(others), (2, b, l), generator=rng)]
    prompts[..., :3] = torch.tensor(bits).reshape(3, 2)[torch.arange(3), drawn]
    answers, place = torch.tensor(bench.tokens[:8]), at.ssm_state(layer=layer, pos=3, e=e, n=n)
    four = torch.tensor([4, 2, 1])
    assert (run(model, prompts[0]).last_logits.argmax(-1) == answers[drawn[0] @ four]).all()
    targets = answers[torch.cat([drawn[1, :, :2], drawn[0, :, 2:]], 1) @ four]
    return model, prompts[0], prompts[1], targets, place, turn[:, :3].T


@cache
def found(seed=0, k=2):
    model, base, donor, targets, place, _ = planted(seed)
    return align(model, base, donor, targets, place, k, seed=seed, progress=False)


# -- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_subspace_is_found(seed):
    made, truth = found(seed), planted(seed)[-1][:2]
    assert made.held_out.accuracy == made.fitted.accuracy == 1
    cosines = torch.linalg.svdvals(made.basis @ truth.T)
    assert cosines.min() > 0.99
