"""One layer of Mamba: normalise, mix along the sequence, add to the residual stream."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import MambaConfig
from .scan import Memory as Memory
from .scan import Ops
from .sites import SITES
from .tap import Tap

INSIDE = tuple(SITES)[tuple(SITES).index("mixer_in") + 1 : tuple(SITES).index("mixer_out")]  # the sites of `Mixer`


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that states and the residual stream are kept in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 or wider, returned in the weight's type."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, w = self.weight, wide(self.weight.dtype)
        return F.rms_norm(x.to(w), x.shape[-1:], weight.to(w), self.eps).to(weight.dtype)  # (b, l, d)


def divided(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, by `RMSNorm`'s rule for types."""
    return F.rms_norm(x.to(wide(x.dtype)), x.shape[-1:], eps=eps).to(x.dtype)


def selection(low: Tensor, sizes: Sequence[int], eps: float | None) -> tuple[Tensor, ...]:
    """dt_low (..., r), B and C (..., n) of what x_proj gives, which FalconMamba (arXiv:2410.05355) divides each by its
    root mean square."""
    parts = low.split(sizes, dim=-1)
    return parts if eps is None else tuple(divided(part, eps) for part in parts)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the same rule for types as `RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        dtype, w = self.weight.dtype, wide(self.weight.dtype)
        return F.layer_norm(x.to(w), x.shape[-1:], self.weight.to(w), self.bias.to(w), self.eps).to(dtype)


def make_norm(config: MambaConfig) -> nn.Module:
    """The norm that the configuration asks for."""
    return RMSNorm(config.d_model, config.norm_eps) if config.rms_norm else LayerNorm(config.d_model, config.norm_eps)


class Mixer(nn.Module):
    """The Mamba block (paper, section 3.4 and figure 3). Parameters have the checkpoint's names.

    Its submodules hold parameters and are not called as modules where an operation of the backend takes their weights,
    so module hooks do not fire; use sites.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        d, e, n, r, k = config.d_model, config.d_inner, config.d_state, config.rank, config.d_conv
        self.sizes, self.rms_eps = (r, n, n), config.mixer_rms_eps
        self.in_proj = nn.Linear(d, 2 * e, bias=config.bias)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1, bias=config.conv_bias)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, d, bias=config.bias)
        self.init_ssm(config)

    @torch.no_grad()
    def init_ssm(self, config: MambaConfig) -> None:
        """S4D-real A = -(1..n), and a dt_proj whose step sizes start log-uniform in [dt_min, dt_max].

        Source: mamba_ssm.modules.mamba_simple.Mamba.__init__ @ e9594ce.
        """
        e, n = self.A_log.shape
        self.A_log.copy_(torch.arange(1, n + 1, dtype=torch.float32).log().expand(e, n))
        self.D.fill_(1.0)
        std = config.rank**-0.5 * config.dt_scale
        if config.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, std)
        else:
            nn.init.uniform_(self.dt_proj.weight, -std, std)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(e) * (high - low) + low).clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor, memory: Memory, mask: Tensor | None, tap: Tap, ops: Ops) -> tuple[Tensor, Memory]:
        """Mix along the sequence: x (b, l, d), the memory before it, mask (b, l) -> (b, l, d), the memory after it."""
        alone = x.shape[1] == 1 and mask is None and not torch.is_grad_enabled()
        if ops.step is not None and alone and not tap.touches(*INSIDE):
            mixed, memory = ops.step(self)(x, memory)
            return tap("mixer_out", mixed), memory
        if ops.block is not None and not tap.edited(*ops.records) and not tap.touches(*{*INSIDE} - {*ops.records}):
            mixed, memory = ops.block(self, x, memory, mask, tap)
            return tap("mixer_out", mixed), memory
        h, window = memory
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, e) each
        x, z = tap("x", x), tap("z", z)
        u, window = self.convolve(x, window, mask, tap, ops)  # (b, l, e)
        y, h = self.scan(u, h, mask, tap, ops)  # (b, l, e)
        y = tap("ssm_out", tap("y", y) + tap("skip", self.D.to(h.dtype) * u))
        gated = tap("gated", (y * tap("gate", F.silu(z.to(h.dtype)))).to(z.dtype))
        return tap("mixer_out", self.out_proj(gated)), (h, window)  # (b, l, d)

    # two parts of `forward`, so that what only they need is gone when they return

    def convolve(
        self, x: Tensor, window: Tensor, mask: Tensor | None, tap: Tap, ops: Ops
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The input of the scan, SiLU(conv(x)) (b, l, e), and the window after it."""
        conv, window = ops.conv(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, window, mask=mask, tap=tap)
        return tap("u", F.silu(tap("conv", conv))), window

    def scan(self, u: Tensor, h: Tensor, mask: Tensor | None, tap: Tap, ops: Ops) -> tuple[Tensor, Tensor]:
        """What the scan of u (b, l, e) reads from its states, y (b, l, e), and the last state."""
        dt_low, B, C = selection(self.x_proj(u), self.sizes, self.rms_eps)  # (b, l, r), (b, l, n), (b, l, n)
        dt_low, B, C = tap("dt_low", dt_low), tap("B", B), tap("C", C)
        dt = F.linear(dt_low, self.dt_proj.weight).to(h.dtype) + self.dt_proj.bias.to(h.dtype)
        dt = F.softplus(dt)  # (b, l, e), float32 or wider from here to `gated`, as inside the kernels
        if mask is not None:
            dt = dt * mask[:, :, None]  # no time passes on padding: decay 1, nothing written
        dt = tap("dt", dt)

        return ops.scan(u, dt, self.A(h.dtype), B, C, h, tap=tap)

    def A(self, dtype: torch.dtype) -> Tensor:
        """A = -exp(A_log) (e, n), the rates < 0 at which states decay, in this type."""
        return -torch.exp(self.A_log.to(dtype))


class Layer(nn.Module):
    """resid + mixer(norm(resid))."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = make_norm(config)
        self.mixer = Mixer(config)

    def forward(
        self, resid: Tensor, memory: Memory, mask: Tensor | None, tap: Tap, ops: Ops, normal: Tensor | None = None,
        following: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor | None, Memory]:  # fmt: skip
        """The residual stream (b, l, d) and the memory before the layer -> the stream, its norm, the memory after it.

        Args:
            normal: the norm of the stream, if the layer before has taken it; else None.
            following: the norm that comes after this layer. A backend with `add_norm` takes it together with the sum;
                otherwise None comes in its place, and the next layer takes it.
        """
        resid = tap("resid_pre", resid)
        if normal is None or tap.touches("resid_pre"):
            normal = self.norm(resid) if ops.add_norm is None else ops.add_norm(resid, None, self.norm)[1]
        mixed, memory = self.mixer(tap("mixer_in", normal), memory, mask, tap, ops)
        if ops.add_norm is not None and following is not None and not tap.touches("resid_post"):
            return *ops.add_norm(resid, mixed, following), memory
        return tap("resid_post", resid + mixed), None, memory
