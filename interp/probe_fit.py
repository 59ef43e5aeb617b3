r"""The pipeline of a probe, all of it fitted on training rows only.

    z = ((x - mean) / std) V / sqrt((1 - s) lambda + s mean(lambda))        scores = z w + b

mean and std of each coordinate, V the first principal components of the scaled rows, lambda their variances, s the
shrinkage; w from a ridge or logistic regression, whose penalty an inner cross-validation chooses. PCA and ZCA whitening
differ by a rotation, which an L2 penalty does not see.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_mamba.errors import InputError, MissingExtra

PENALTIES = tuple(10.0**i for i in range(-1, 5))  # of a sum of squares over rows, on coordinates of variance one
INNER = 3  # folds of the inner cross-validation
FLAT = 1e-7  # of its own size: a coordinate that varies by less is constant
Z95 = 1.96
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class How:
    """The choices of `probe`; `classes` is how many there are, 0 of numbers."""

    dims: int
    whiten: bool
    centre: bool
    shrinkage: float
    kind: str
    classes: int

    def __post_init__(self) -> None:
        if self.dims < 1 or not 0 <= self.shrinkage <= 1 or self.kind not in ("ridge", "logistic"):
            raise InputError(
                f"dims={self.dims}, shrinkage={self.shrinkage}, kind={self.kind!r}: at least 1; 0 to 1; 'ridge' or "
                "'logistic'."
            )
        if self.kind == "logistic" and not self.classes:
            raise InputError("kind='logistic' is for classes (ints, bools, strings); these labels are numbers.")


@dataclass(frozen=True, eq=False)
class Space:
    """z = (x - mean) basis, with mean (f,) and basis (f, k)."""

    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, x: Tensor, how: How) -> "Space":
        """Fit on rows x (n, f)."""
        mean = x.mean(0) if how.centre else torch.zeros_like(x[0])
        centred = x - mean
        std = centred.square().mean(0).sqrt()
        alive = std > FLAT * x.abs().amax(0)
        inverse = torch.where(alive, 1 / std.where(alive, 1), 0)
        c = centred.mul_(inverse)
        n, f = c.shape
        wide = f > n  # then the same components come from the rows' inner products
        variance, v = torch.linalg.eigh((c @ c.T if wide else c.T @ c) / n)
        keep = (variance > 1e-10 * variance[-1].clamp(min=1e-300)).nonzero()[:, 0].flip(0)[: how.dims]
        v = c.T @ v[:, keep] / (variance[keep] * n).sqrt() if wide else v[:, keep]
        level = variance[keep].mean()
        scale = (1 - how.shrinkage) * variance[keep] + how.shrinkage * level if how.whiten else level
        return cls(mean, inverse[:, None] * v / scale.sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, f) -> (rows, k)."""
        return (x - self.mean) @ self.basis


def fit(z: Tensor, y: Tensor, group: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Weights (classes or 1, k) and bias; the penalty is the one with the least held-out loss within these rows."""
    solve, penalties = (_logistic, PENALTIES[::2]) if how.kind == "logistic" else (_ridge, PENALTIES)
    part = _parts(y, group, how)
    inner = int(part.max()) + 1
    loss = torch.zeros(len(penalties), dtype=torch.float64)
    for i in range(inner if inner > 1 else 0):
        train, test = part != i, part == i
        for j, (w, b) in enumerate(solve(z[train], y[train], how, penalties)):
            loss[j] += _loss(z[test] @ w.T + b, y[test], how)
    return solve(z, y, how, [penalties[int(loss.argmin())]])[0]


def _parts(y: Tensor, group: Tensor, how: How) -> Tensor:
    """(rows,) the inner fold of each row, by group: drawn, because designs come in cycles; each class is in each."""
    names, group = group.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    if how.classes:
        label = y.new_zeros(len(names)).scatter_reduce(0, group, y, "amin", include_self=False)
        order = order[label[order].argsort(stable=True)]
    return (order.argsort() % min(INNER, len(names)))[group]


def _targets(y: Tensor, how: How) -> Tensor:
    return F.one_hot(y, how.classes).double() if how.classes else y[:, None]


def _loss(scores: Tensor, y: Tensor, how: How) -> Tensor:
    if how.kind == "logistic":
        return F.cross_entropy(scores, y, reduction="sum")
    return (scores - _targets(y, how)).square().sum()


def _ridge(z: Tensor, y: Tensor, how: How, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """argmin |z w + b - y|^2 + penalty |w|^2, of classes for one column each."""
    target = _targets(y, how)
    centre, level = z.mean(0), target.mean(0)
    variance, v = torch.linalg.eigh((z - centre).T @ (z - centre))
    moment = v.T @ ((z - centre).T @ (target - level))  # (k, m)
    found = []
    for penalty in penalties:
        w = (v @ (moment / (variance.clamp(min=0) + penalty)[:, None])).T  # (m, k)
        found.append((w, level - w @ centre))
    return found


def _logistic(z: Tensor, y: Tensor, how: How, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra(
            "kind='logistic' needs scikit-learn: pip install 'mambascope[probes]'. kind='ridge' does not."
        ) from None
    present = y.unique()
    if len(present) < 2 or not z.shape[1]:
        raise InputError("training rows of one class, or features that do not vary: kind='ridge' copes with that.")
    found = []
    for penalty in penalties:
        made = LogisticRegression(C=1 / penalty, max_iter=1000).fit(z.numpy(), y.numpy())
        w, b = torch.as_tensor(made.coef_).double(), torch.as_tensor(made.intercept_).double()
        if len(present) == 2:
            w, b = torch.cat([-w / 2, w / 2]), torch.cat([-b / 2, b / 2])
        whole_w, whole_b = w.new_zeros(how.classes, z.shape[1]), b.new_full((how.classes,), -1e9)
        whole_w[present], whole_b[present] = w, b  # a class that these rows lack is never named
        found.append((whole_w, whole_b))
    return found


def decide(scores: Tensor, how: How) -> Tensor:
    """(rows,) the class of the highest score, or the number."""
    return scores.argmax(1) if how.classes else scores[:, 0]


def commonest(y: Tensor, how: How) -> Tensor:
    """What one says without features: the commonest class, or the mean."""
    return torch.bincount(y, minlength=how.classes).argmax() if how.classes else y.mean()


def _scores(y: Tensor, guess: Tensor, blind: Tensor, how: How, weight: Tensor) -> Tensor:
    """(draws,) accuracy, or R^2, of rows counted `weight` (draws, rows) times."""
    if how.classes:
        return weight @ (guess == y).double() / weight.sum(1)
    return 1 - weight @ (y - guess).square() / (weight @ (y - blind).square())


def score(y: Tensor, guess: Tensor, blind: Tensor, how: How) -> float:
    """Accuracy, or 1 - sum (y - guess)^2 / sum (y - blind)^2."""
    return _scores(y, guess, blind, how, torch.ones(1, len(y), dtype=torch.float64)).item()


def interval(
    y: Tensor, guess: Tensor, blind: Tensor, group: Tensor, how: How, rng: torch.Generator
) -> tuple[float, float]:
    """95 % interval of `score`: Wilson's of as many draws as the groups are worth, or a bootstrap of R^2 over groups.

    A group is one draw, and a large one weighs more in the score: n is (sum c)^2 / sum c^2, of groups of c rows (Kish
    1965, Survey Sampling, section 11.7), the number of groups where they are of one size.
    """
    sizes = group.bincount()
    if how.classes:
        p, n = score(y, guess, blind, how), len(group) ** 2 / sizes.square().sum().item()
        return wilson(p, n)
    drawn = torch.randint(len(sizes), (DRAWS, len(sizes)), generator=rng)
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add(1, drawn, torch.ones_like(drawn).double())
    found = _scores(y, guess, blind, how, times[:, group])
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share p of n draws.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    middle, half = p + Z95**2 / (2 * n), Z95 * (p * (1 - p) / n + Z95**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + side) / (1 + Z95**2 / n) for side in (-half, half))
    return max(0.0, min(p, low)), min(1.0, max(p, high))


def patterns(x: Tensor, y: Tensor, how: How) -> Tensor:
    """(classes, f) each class's mean less the mean; of numbers (1, f), what x moves by for one unit of y."""
    centred = x - x.mean(0)
    if not how.classes:
        return ((y - y.mean()) @ centred / (y - y.mean()).square().sum())[None]
    member = _targets(y, how)
    return member.T @ centred / member.sum(0)[:, None]


def like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rows drawn from the Gaussian with the mean and the covariance of the rows x (n, f)."""
    centred, n = x - x.mean(0), len(x)
    if n <= x.shape[1]:
        return x.mean(0) + torch.randn(n, n, generator=rng, dtype=x.dtype) @ centred / (n - 1) ** 0.5
    variance, v = torch.linalg.eigh(centred.T @ centred / (n - 1))
    drawn = torch.randn(n, x.shape[1], generator=rng, dtype=x.dtype)
    return x.mean(0) + drawn @ (variance.clamp(min=0).sqrt()[:, None] * v.T)
