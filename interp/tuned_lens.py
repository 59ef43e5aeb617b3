"""Tuned lens: what the model will answer, read from the stream before a layer by an affine map that is learned.

    logits_i = lm_head(norm_f(h_i + A_i h_i + b_i))        h_i = resid_pre of layer i; A_i (d, d), b_i (d)

The logit lens is A = b = 0: it reads the stream of an early layer as if it were the last one's. Each map is fitted to
the model's own distribution, min E KL(model || lens) over positions, and scored on rows that it was not fitted on,
beside

    plain      the logit lens
    constant   the model's mean distribution over the fitted positions: what can be said without a look at the stream

It shows what an affine map can read off a layer, not what the model reads there: no layer has that map. Where few
positions are fitted, it learns them by heart; `fitted` is then far below `tuned`. And the last norm gives whatever it
is given one length: a lens that sees nothing cannot say so by being unsure, and may do worse than `constant`.

Source: Belrose et al. 2023 (arXiv:2303.08112); on Mamba, Paulo et al. 2024 (arXiv:2404.05971). Differs: all layers at
once; Adam, with each coordinate in units of its own root mean square, until the loss stops to fall; the scores are on
rows of their own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from minimal_mamba import Mamba, at
from minimal_mamba.block import wide
from minimal_mamba.brief import Brief
from minimal_mamba.errors import CheckpointError, InputError
from minimal_mamba.files import make_folder, write_files
from minimal_mamba.provenance import model_digest, provenance

from .descent import Descent
from .probe_rows import hold_out, read_groups, read_ints
from .probes import collect
from .run import Lengths, known
from .swaps import still
from .sweep.engine import rows_at_once

VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Brief):
    """The maps of all layers, and how near they come to the model's own distribution.

    Args:
        weight: (layers, d, d) A, as `nn.Linear` has it. bias: (layers, d) b.
        tuned, plain: (layers, rows held out) KL(model || lens), nats, the mean over a row's positions.
        constant: (rows held out) the same without a look at the stream.
        fitted: (layers,) the mean over all positions that were fitted.
        tested: (b,) bool, the rows that were held out.
        losses: (epochs, layers) the mean while they were fitted.
        model: digest of the model that it was made for.
    """

    weight: Tensor
    bias: Tensor
    tuned: Tensor
    plain: Tensor
    constant: Tensor
    fitted: Tensor
    tested: Tensor
    losses: Tensor = field(repr=False)
    model: str = field(repr=False)

    def __call__(self, stream: Tensor, layer: int) -> Tensor:
        """h + A h + b of the stream (..., d) before a layer; the stream behind the last, `layer` = layers, as it is."""
        if layer == len(self.weight):
            return stream
        a, b = (x[layer].to(stream.device, wide(stream.dtype)) for x in (self.weight, self.bias))
        return (stream.to(a.dtype) + F.linear(stream.to(a.dtype), a, b)).to(stream.dtype)

    def save(self, path: str | Path) -> None:
        """Write all of it to one safetensors file; a failed write leaves what was there."""
        path = Path(path)
        parts = {name: x.detach().cpu().contiguous() for name, x in vars(self).items() if isinstance(x, Tensor)}
        head = {"version": str(VERSION), "model": self.model, "provenance": json.dumps(provenance())}
        write_files(make_folder(path.parent), {path.name: lambda file: save_file(parts, file, head)})

    @classmethod
    def load(cls, path: str | Path, model: Mamba | None = None) -> "TunedLens":
        """What `save` wrote.

        Args:
            model: the one that it is to be of; None: any, as for a fine-tuned one that has a lens of its base.
        Raises:
            CheckpointError: no such file, of another version, or of other weights.
        """
        try:
            with safe_open(path, "pt") as file:
                head = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} holds no tuned lens: {error}.") from None
        named = {f.name for f in fields(cls)}
        if head.get("version") != str(VERSION) or found.keys() | {"model"} != named:
            raise CheckpointError(
                f"{path} is no tuned lens of version {VERSION}: it has version {head.get('version')!r} and holds "
                f"{', '.join(sorted(found)) or 'nothing'}."
            )
        if model is not None and head["model"] != model_digest(model):
            raise CheckpointError(f"{path} was made for other weights than this model's; without model= it is read.")
        return cls(**found, model=head["model"])


@torch.inference_mode(mode=False)
@torch.enable_grad()
def tuned_lens(
    model: Mamba, ids: Tensor, *, lengths: Lengths = None, groups: Any = None, held_out: float = 0.2,
    epochs: int = 200, batch: int = 256, learning_rate: float = 0.03, seed: int = 0, backend: str = "auto",
    progress: bool = True,
) -> TunedLens:  # fmt: skip
    """Fit the maps of all layers; `logit_lens(..., lens=)` reads through them.

    Args:
        ids: (b, l) text such as the lens is to read; all positions of all rows are used. lengths: as in `run`.
        groups: (b,) what rows share; a group is not on both sides. None: rows of the same tokens.
        held_out: the share of the groups that the scores are taken of.
        epochs: passes over the fitted positions, at most; the search ends when the loss has stopped to fall at three
            learning rates, each a third of the one before. batch: positions of a step. learning_rate: of Adam.
        seed: of the groups held out, and of the order.
    Returns:
        TunedLens, its maps in float32, or float64 for a float64 model.
    Raises:
        InputError: no rows to hold out, and what `run` raises.
    Cost: one forward, which holds (layers + 1, positions, d) on the CPU; an epoch is a head and its backward for each
        layer and fitted position, (batch, v) at a time.
    """
    known(model)
    epochs, seed = read_ints(epochs=epochs, seed=seed)
    batch = rows_at_once(batch, 256, 1)
    if not 0 < held_out < 1 or epochs < 1 or not learning_rate > 0:
        raise InputError(
            f"held_out={held_out}, epochs={epochs}, learning_rate={learning_rate}: a share between 0 and 1; 1 or more; "
            "above 0."
        )
    ids, sizes = model.check(ids, lengths)
    rng = torch.Generator().manual_seed(seed)
    tokens = [tuple(row[:n]) for row, n in zip(ids.tolist(), sizes.tolist(), strict=True)]
    tested = hold_out(read_groups(tokens if groups is None else groups, len(ids)), held_out, rng)
    stream, row = _streams(model, ids, sizes, backend)  # (layers + 1, positions, d), (positions,)
    train, test = (~tested[row]).nonzero()[:, 0], tested[row].nonzero()[:, 0]
    layers, _, d = stream.shape[0] - 1, *stream.shape[1:]
    head, w = _head(model), stream.dtype
    size = stream[:-1, train].square().mean(1).sqrt()  # (layers, d)
    size = size.where(size > 0, 1.0).to(model.device)
    maps = [torch.zeros(d + 1, d, dtype=w, device=model.device, requires_grad=True) for _ in range(layers)]

    def streams(i: int, rows: Tensor) -> Tensor:
        return stream[i, rows].to(model.device)

    def read(i: int, h: Tensor) -> Tensor:
        """log q of the stream (m, d) before layer i; A and b in units of the coordinates."""
        scaled = h / size[i]
        return head((scaled + scaled @ maps[i][:d] + maps[i][d]) * size[i])

    descent, losses = Descent(maps, learning_rate), list[Tensor]()
    bar = trange(epochs, desc="tuned lens", disable=not progress)
    for _ in bar:
        total = torch.zeros(layers, dtype=torch.float64)
        for some in train[torch.randperm(len(train), generator=rng)].split(batch):
            said, gradients = head(streams(-1, some)), list[Tensor]()
            for i, one in enumerate(maps):
                gap = _kl(said, read(i, streams(i, some)))
                gradients += torch.autograd.grad(gap.mean(), [one])
                total[i] += gap.sum().item()
            descent.step(gradients)
        losses.append(total / len(train))
        bar.set_postfix(nats=f"{losses[-1].mean():.3f}")
        if descent.ended(float(losses[-1].mean())):
            break
    bar.close()

    @torch.no_grad()
    def gaps(rows: Tensor, lens: Callable[[int, Tensor], Tensor], over: Sequence[int] = range(layers)) -> Tensor:
        """(layers, positions) KL(model || lens)."""
        found = []
        for some in rows.split(batch):
            said = head(streams(-1, some))
            found.append(torch.stack([_kl(said, lens(i, streams(i, some))) for i in over]).double().cpu())
        return torch.cat(found, -1)

    def by_row(values: Tensor) -> Tensor:
        """(layers, rows held out) the means over each row's positions."""
        sums = values.new_zeros(len(values), len(ids)).index_add(1, row[test], values)
        return (sums / row[test].bincount(minlength=len(ids)))[:, tested]

    mean = torch.zeros(model.config.vocab_size, dtype=w, device=model.device)
    for some in train.split(batch):
        mean += head(streams(-1, some)).exp().sum(0) / len(train)
    tuned, plain = by_row(gaps(test, read)), by_row(gaps(test, lambda i, h: head(h)))
    constant = by_row(gaps(test, lambda i, h: mean.log(), [-1]))[0]
    fitted = gaps(train, read).mean(-1)
    free = torch.stack([one.detach() for one in maps])  # (layers, d + 1, d)
    weight = (free[:, :d] * size[:, None] / size[..., None]).mT.contiguous()
    return TunedLens(weight, free[:, d] * size, tuned, plain, constant, fitted, tested, torch.stack(losses),
                      model_digest(model))  # fmt: skip


def _streams(model: Mamba, ids: Tensor, sizes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The stream before each layer and behind the last, (layers + 1, positions of all rows, d), and each one's row."""
    before, behind = at.resid_pre(layer=slice(None)), at.resid_post(layer=-1)
    found = collect(model, ids, [before, behind], lengths=sizes, backend=backend)
    here = torch.arange(ids.shape[1]) < sizes[:, None]  # (b, l)
    each = [*found[before], found[behind]]  # (b, the longest row's, d)
    stream = torch.stack([one[here[:, : one.shape[1]]] for one in each])
    return stream.to(wide(model.dtype)), here.nonzero()[:, 0]


def _head(model: Mamba) -> Callable[[Tensor], Tensor]:
    """log p over the vocabulary of a stream (..., d), in float32 or wider, and without gradients of its weights."""
    w, norm, head = wide(model.dtype), still(model.backbone.norm_f), still(model.lm_head)
    norm, weight = norm.to(w), head.weight[: model.config.vocab_size].to(w)
    return lambda h: F.linear(norm(h), weight).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last axis, of log-probabilities."""
    return F.kl_div(q.expand_as(p), p, log_target=True, reduction="none").sum(-1)
