"""A model built by hand, whose state counts something in one channel: patching, which is not told, finds it."""

import pytest
import torch

from interp import Set, at, patch_grid, run
from minimal_mamba import Mamba, MambaConfig

D, E, N, LAYERS, TICK, REST = 4, 8, 6, 2, 3, 5
RATE = 1e-3  # how fast the count decays: one part in a thousand a unit of time


def planted(seed):
    """A model in which the state of one (layer, channel, dimension), drawn from the seed, sums the TICKs seen so far.

    Embeddings hold a one in dimension 0 (always) and in dimension 1 (TICK only). The drawn layer reads dimension 1 into
    channel e, writes u_e into dimension n (B_n is read from a channel that is always on), reads it with C_n, and puts
    it into dimension 2, which the head turns into the logit of token 0. All other weights of the path are zero.
    """
    rng = torch.Generator().manual_seed(seed)
    layer, n = int(torch.randint(LAYERS, (1,), generator=rng)), int(torch.randint(N, (1,), generator=rng))
    e, constant = torch.randperm(E, generator=rng)[:2].tolist()
    model = Mamba(
        MambaConfig(
            d_model=D,
            n_layer=LAYERS,
            vocab_size=8,
            d_state=N,
            d_conv=2,
            dt_rank=1,
            expand=2,
            tie_embeddings=False,
            pad_vocab_size_multiple=1,
        )
    ).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_()
            if name.endswith("A_log"):
                p.fill_(torch.tensor(RATE).log())
            if "norm" in name:
                p.fill_(1.0)
            if name.endswith("dt_proj.bias"):
                p.fill_(torch.tensor(1.0).expm1().log())  # softplus gives 1: time passes evenly
        embedding = model.backbone.embedding.weight
        embedding[:, 0] = 1.0
        embedding[TICK, 1] = 1.0
        m = model.backbone.layers[layer].mixer
        m.in_proj.weight[e, 1] = 4.0  # x_e: on where the token is TICK
        m.in_proj.weight[constant, 0] = 4.0
        m.in_proj.weight[E + e, 0] = 4.0  # z_e: the gate of e is open
        m.conv1d.weight[:, 0, -1] = 1.0
        m.x_proj.weight[1 + n, constant] = 0.25  # B_n
        m.x_proj.weight[1 + N + n, constant] = 0.25  # C_n
        m.out_proj.weight[2, e] = 0.002  # small beside the residual stream, so that the last norm does not saturate
        model.lm_head.weight[0, 2] = 1.0
    return model, layer, e, n


IDS = torch.tensor([[REST, REST, TICK, REST, REST, REST], [REST, TICK, REST, TICK, TICK, REST]])
DONOR = torch.tensor([[TICK, REST, TICK, TICK, REST, REST], [REST, REST, REST, REST, TICK, REST]])


def score(logits):
    return logits[:, -1, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("seed", range(6))
def test_patching_finds_the_channel_and_nothing_else(seed, backend):
    model, *truth = planted(seed)
    pos = 4  # the last token is a REST in both: what differs is what is remembered
    effects = torch.zeros(LAYERS, E, N, dtype=torch.float64)
    with torch.no_grad():
        states = at.ssm_state(pos=pos)
        donor = run(model, DONOR, record=[states], backend=backend)
        base = score(run(model, IDS, backend=backend).logits)
        for layer in range(LAYERS):
            for e in range(E):
                for n in range(N):
                    place = at.ssm_state(layer=layer, pos=pos, e=e, n=n)
                    patch = Set(place, donor[states][layer, :, e, n])
                    effects[layer, e, n] = (score(run(model, IDS, [patch], backend=backend).logits) - base).abs().min()
    assert effects[tuple(truth)] > 0.05
    found = effects.nonzero().tolist()  # exactly zero everywhere else
    assert found == [truth]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_the_channel_counts(seed, backend):
    """The planted state is what it is said to be: the TICKs so far, each faded at the known rate."""
    model, layer, e, n = planted(seed)
    place = at.ssm_state(layer=layer)
    with torch.no_grad():
        out = run(model, IDS, record=[place, at.state_write(layer=layer)], backend=backend)
    state, write = out[place], out[at.state_write(layer=layer)]
    unit = write[0, 2, e, n]
    assert unit > 0.5
    fade = torch.exp(torch.tensor(-RATE, dtype=torch.float64))
    for b in range(2):
        for t in range(6):
            expected = sum(unit * fade ** (t - s) for s in range(t + 1) if IDS[b, s] == TICK)
            torch.testing.assert_close(
                state[b, t, e, n], torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
            )
    others = state.clone()
    others[..., e, n] = 0
    assert not others[:, :, e].any()


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_of_layers_and_positions_finds_the_layer(seed):
    model, layer, _, _ = planted(seed)
    grid = patch_grid(model, IDS, DONOR, site="ssm_state", metric=score, progress=False)
    other = 1 - layer
    assert grid.effect()[other].abs().max() < 1e-12  # a cell is a run of its own shape, which rounds as it may
    counts = [(ids == TICK).cumsum(1) for ids in (IDS, DONOR)]
    moved = grid.effect()[layer].abs() > 1e-3  # (l, b): wherever the counts so far differ
    assert torch.equal(moved[:5], (counts[0] != counts[1]).T[:5])
    torch.testing.assert_close(grid.values[layer, -1], grid.donor, rtol=1e-9, atol=1e-9)
