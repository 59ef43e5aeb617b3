"""The workbench on which models are planted: a Mamba full of active distractors, and channels carved out of it.

Everything is exact in float64. The norms have so large an epsilon that they are the identity. A token is a one in a
residual dimension of its own, beside a dimension that is always one. A circuit's channel takes from each token a number
c with SiLU(c) = the value wanted, its gate is SiLU(c) = 1, and B and C are read from such channels. Whatever is not
carved is random: those channels and state dimensions are larger than the circuit's and carry the tokens too, but they
write only into residual dimensions that nothing of the circuit and no logit of the metric reads.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minimal_mamba import Mamba, MambaConfig

EPS = 1e30  # beside it the mean of squares vanishes: x / sqrt(EPS) * sqrt(EPS)
LAYERS, VOCAB, D_STATE, D_CONV, RANK = 3, 12, 5, 4, 3
SHUT = -40.0  # softplus of it, 4e-18, is no time at all


def silu_inverse(value: float) -> float:
    """c >= 0 with SiLU(c) = value >= 0, by Newton's method."""
    c = value
    for _ in range(60):
        s = 1 / (1 + math.exp(-c))
        c -= (c * s - value) / (s + c * s * (1 - s))
    return c


def softplus_inverse(value: float) -> float:
    """x with log(1 + exp(x)) = value > 0."""
    return value + math.log(-math.expm1(-value))


class Bench:
    """A model under construction; the seed draws its weights, and which layer, channels, dimensions and tokens serve.

    `tokens`, `layer`, `out` and `mid` are drawn; `channel` and `dimension` draw one that is still free.
    """

    @torch.no_grad()
    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)
        config = MambaConfig(
            d_model=24, n_layer=LAYERS, vocab_size=VOCAB, d_state=D_STATE, d_conv=D_CONV, dt_rank=RANK, expand=2,
            tie_embeddings=False, norm_eps=EPS, pad_vocab_size_multiple=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            self.model = Mamba(config).double()
        self.e, self.n = config.d_inner, config.d_state
        dims = self.draw(config.d_model)
        self.one, self.code, self.out, self.mid, self.junk = dims[0], dims[1:13], dims[13:17], dims[17:21], dims[21:]
        self.tokens = self.draw(VOCAB)
        self.layer = self.draw(LAYERS)[0]
        self._channels = [self.draw(self.e) for _ in range(LAYERS)]
        self._dims = [self.draw(self.n) for _ in range(LAYERS)]
        self.used: list[set[int]] = [set() for _ in range(LAYERS)]
        self._fill()

    def draw(self, n: int) -> list[int]:
        """A permutation of 0..n-1."""
        return torch.randperm(n, generator=self.rng).tolist()

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers of 0..high-1."""
        return torch.randint(high, shape, generator=self.rng)

    def _normal(self, weight: Tensor, std: float, mean: float = 0.0) -> None:
        weight.copy_(mean + std * torch.randn(weight.shape, generator=self.rng, dtype=torch.float64))

    def _fill(self) -> None:
        """Distractors everywhere: active channels, which write into the junk dimensions and read them again."""
        model = self.model
        for p in model.parameters():
            p.zero_()
        embedding = model.backbone.embedding.weight
        embedding[:, self.one] = 1.0
        embedding[range(VOCAB), self.code] = 1.0
        for norm in (model.backbone.norm_f, *(layer.norm for layer in model.backbone.layers)):
            norm.weight.fill_(math.sqrt(EPS))  # type: ignore[operator]
        for layer in model.backbone.layers:
            m = layer.mixer
            self._normal(m.in_proj.weight, 0.8)
            m.in_proj.weight[:, [*self.out, *self.mid, *self.junk]] *= 0.1  # so that nothing grows from layer to layer
            self._normal(m.conv1d.weight, 0.7)
            self._normal(m.x_proj.weight, 1.0 * self.e**-0.5)
            self._normal(m.dt_proj.weight, 0.3)
            self._normal(m.dt_proj.bias, 0.3, mean=-0.5)
            self._normal(m.A_log, 0.8, mean=-1.5)
            self._normal(m.D, 0.5)
            junk = torch.empty(len(self.junk), self.e, dtype=torch.float64)
            self._normal(junk, 0.3 * self.e**-0.5)
            m.out_proj.weight[self.junk] = junk
        head = torch.empty(VOCAB, len(self.junk), dtype=torch.float64)
        self._normal(head, 1.0)
        model.lm_head.weight[:, self.junk] = head

    @torch.no_grad()
    def channel(
        self, layer: int, values: Mapping[int, float] | float, *, tap: int = 0, dt: float | None = 1.0,
        rate: float = 1.0, skip: float = 0.0, to: int | None = None,
    ) -> int:  # fmt: skip
        """Carve a channel whose u is values[token] for the token `tap` positions ago, or one number always.

        Args:
            dt: its step size; None shuts it. rate: |A| in all its state dimensions. skip: its D.
            to: the residual dimension that its output is added to; None: nowhere. Its gate is 1.
        Returns:
            e, drawn.
        """
        e = self._channels[layer].pop()
        self.used[layer].add(e)
        m = self.model.backbone.layers[layer].mixer
        m.in_proj.weight[e], m.in_proj.weight[self.e + e], m.conv1d.weight[e], m.dt_proj.weight[e] = 0, 0, 0, 0
        m.x_proj.weight[:, e], m.out_proj.weight[:, e] = 0, 0
        if isinstance(values, Mapping):
            for token, value in values.items():
                m.in_proj.weight[e, self.code[token]] = silu_inverse(value)
        else:
            m.in_proj.weight[e, self.one] = silu_inverse(values)
        m.in_proj.weight[self.e + e, self.one] = silu_inverse(1.0)
        m.conv1d.weight[e, 0, D_CONV - 1 - tap] = 1.0
        m.conv1d.bias[e] = 0  # type: ignore[index]
        m.dt_proj.bias[e] = SHUT if dt is None else softplus_inverse(dt)
        m.A_log[e] = math.log(rate)
        m.D[e] = skip
        if to is not None:
            m.out_proj.weight[to, e] = 1.0
        return e

    @torch.no_grad()
    def dimension(self, layer: int) -> int:
        """Carve a state dimension: its B and C are zero until `connect` sets them."""
        n = self._dims[layer].pop()
        x_proj = self.model.backbone.layers[layer].mixer.x_proj.weight
        x_proj[RANK + n], x_proj[RANK + self.n + n] = 0, 0
        return n

    @torch.no_grad()
    def connect(self, layer: int, n: int, *, B: Mapping[int, float], C: Mapping[int, float]) -> None:
        """B_n and C_n as sums of the u of channels."""
        x_proj = self.model.backbone.layers[layer].mixer.x_proj.weight
        for e, weight in B.items():
            x_proj[RANK + n, e] = weight
        for e, weight in C.items():
            x_proj[RANK + self.n + n, e] = weight

    @torch.no_grad()
    def finish(self, head: Mapping[int, int]) -> Mamba:
        """Of each spare dimension of a circuit's layer shut B or C, and let each token of `head` read one dimension.

        A spare dimension with B open holds what the circuit's channels hold, and is never read.
        """
        for layer, spare in enumerate(self._dims):
            x_proj = self.model.backbone.layers[layer].mixer.x_proj.weight
            if len(spare) < self.n:  # some dimension of this layer was carved
                for i, n in enumerate(spare):
                    x_proj[RANK + n + (self.n if i % 2 == 0 else 0)] = 0
        for token, dim in head.items():
            self.model.lm_head.weight[token] = 0
            self.model.lm_head.weight[token, dim] = 1.0
        return self.model.eval()
