"""What the check runs on: seeded models, tokens, and edits that nobody chose."""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minimal_mamba import Add, Edit, Mamba, MambaConfig, MambaState, Mean, Plan, Project, Scale, Set, Zero, at
from minimal_mamba.sites import SITES

from ..lively import lively

SMALL = MambaConfig(d_model=64, n_layer=2, vocab_size=96, d_state=16, d_conv=4, pad_vocab_size_multiple=1)
ODD = MambaConfig(  # every choice other than SMALL's, and sizes that no vector load fits: 181 channels, where
    # `compiled.kernels.width` takes 176 at once
    d_model=50, n_layer=2, vocab_size=61, d_state=11, d_conv=3, expand=3.63, dt_rank=7, conv_bias=False, bias=True,
    rms_norm=False, residual_in_fp32=False, tie_embeddings=False,
)  # fmt: skip
FALCON = replace(SMALL, mixer_rms_eps=1e-6)
LARGE = MambaConfig(d_model=768, n_layer=24, vocab_size=50277)  # mamba-130m
# every sixteenth channel from the first on: what its steps' bias is moved by, and the size of its u and A
UNLIKE = ((0, -9.0, 8.0), (8, 25.0, 1 / 32))
SIZES = {"small": SMALL, "odd": ODD, "falcon": FALCON, "130m": LARGE}


def draw_model(config: MambaConfig, seed: int) -> Mamba:
    """A float64 model under whose weights the scan carries the logits, with steps from 1e-5 to 30.

    A `lively` one has steps of 0.05 to 3, between the bounds at which a kernel may cut a step or treat it otherwise.
    Here they are short in one channel of sixteen, and in another beyond 20, where softplus is the identity. u and A are
    larger in the first and smaller in the second, and what else u goes into the other way round: so long steps write
    and keep what others do, and hide nothing, and short ones are not lost beside them.
    """
    with torch.random.fork_rng(devices=[]):
        model = lively(Mamba(config).double(), seed)
    with torch.no_grad():
        for layer in model.backbone.layers:
            m = layer.mixer
            for first, shift, size in UNLIKE:
                some = slice(first, None, 16)
                m.dt_proj.bias[some] += shift
                m.conv1d.weight[some] *= size
                if m.conv1d.bias is not None:
                    m.conv1d.bias[some] *= size
                m.A_log[some] += math.log(size)
                m.x_proj.weight[:, some] /= size
                m.D[some] /= size
    return model


def draw_ids(config: MambaConfig, b: int, l: int, seed: int) -> Tensor:
    """(b, l) tokens."""
    return torch.randint(0, config.vocab_size, (b, l), generator=torch.Generator().manual_seed(seed))


def draw_lengths(b: int, l: int, seed: int) -> list[int]:
    """Lengths of b rows: l, and where b allows it 1, l - 1, a half, and others."""
    r = random.Random(seed)
    return [l, 1, max(l - 1, 1), (l + 1) // 2, *(r.randint(1, l) for _ in range(b - 4))][:b]


def draw_state(model: Mamba, b: int, seed: int) -> MambaState:
    """A memory of every layer, from which b rows may start."""
    rng = torch.Generator().manual_seed(seed)
    blank = model.initial_state(b)
    h, window = (
        tuple(torch.randn(part.shape, generator=rng).to(part) for part in parts)
        for parts in (blank.ssm_state, blank.conv_state)
    )
    return replace(blank, ssm_state=h, conv_state=window)


def _sizes(config: MambaConfig) -> Tensor:
    """(e,) of what size u is in the channels of a drawn model, most of them 1."""
    sizes = torch.ones(config.d_inner, dtype=torch.float64)
    for first, _, size in UNLIKE:
        sizes[first::16] = size
    return sizes


@dataclass(frozen=True)
class Draw:
    """How many edits, and at most how many positions of the recurrence each of them touches."""

    edits: int = 6
    positions: int = 3


def draw_edits(config: MambaConfig, b: int, l: int, seed: int, draw: Draw = Draw()) -> list[Edit]:
    """Edits of any kind at any site, layer, position, channel and row; values of the size of a drawn model's own.

    The first is a Set of `ssm_state`, so that a check with edits is never one without an edit of the state. The others
    go round all sites from one seed to the next. The second is where the first is, every other time in `state_read`, as
    what a replaced state hides or shows is a matter of its own.
    """
    r, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    others = [s for s in SITES if s not in ("logits", "final_norm")]
    random.Random(0).shuffle(others)
    made: list[Edit] = []
    for i in range(draw.edits):
        site = others[(seed * (draw.edits - 2) + i) % len(others)]
        if i < 2:
            site = ("state_read", "decay", "state_read", "state_write")[seed % 4] if i else "ssm_state"
        spec = SITES[site]
        positions = sorted(r.sample(range(l), min(l, r.randint(1, draw.positions))))
        fields: dict[str, object] = {"pos": positions}
        if spec.layered:
            fields["layer"] = r.randrange(config.n_layer)
        if i == 1:
            fields = {"pos": made[0].address.pos, "layer": made[0].address.layer}
        if r.random() < 0.3:
            axis = r.choice(spec.features)
            fields[axis] = sorted(r.sample(range(config.size(axis)), max(1, config.size(axis) // 2)))
        place = getattr(at, site)(**fields)
        rows = [r.randrange(b)] if r.random() < 0.3 else None
        zero = torch.zeros(b, dtype=torch.long)
        shape = list(Plan(config, [bare := Zero(place, rows=rows)], [], zero, zero + l).shape(bare))
        value = 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)
        kinds = ["Set", "Add", "Scale", "Zero", "Mean", "Project"] if i else ["Set"]
        if site in ("dt", "decay"):  # below zero, or kept more than wholly, states explode
            value = value.abs().clamp(max=1.0)
            kinds.remove("Project")
        if i and site in ("embed", "resid_pre", "resid_post") and "d" not in fields:
            kinds.remove("Zero")  # the norm of zeros has the slope eps^-0.5, 316, in each layer: float16 ends at 65504
        kind = r.choice(kinds)
        if site in ("conv", "u") and kind in ("Set", "Add", "Mean"):
            chosen = fields.get("e", slice(None))
            value = value * _sizes(config)[chosen]  # type: ignore[index]
        if kind == "Project":
            basis = torch.randn([1, *shape[2:]], generator=rng, dtype=torch.float64)
            made.append(Project(place, basis, rows=rows))
        elif kind == "Mean":
            made.append(Mean(place, value.mean((0, 1)), rows=rows))
        elif kind == "Zero":
            made.append(Zero(place, rows=rows))
        else:
            made.append({"Set": Set, "Add": Add, "Scale": Scale}[kind](place, value, rows=rows))
    return made
