"""Virtual tokens: states written, replaced and read inside one scan of a kernel that takes only tokens.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = C_t h_t

    write a state   n tokens: dt tiny, so that nothing decays, u the i-th column of the state over dt, B = e_i
    erase a state   one token: dt huge, u = 0
    read a state    n tokens: dt = 0, u = 0, C = e_i, so that y is h[..., i]
    read again      one token: dt = 0, u = 0, C = C_t, for a y_t after something was written at t

The kernel's own backward then carries the gradient of every state: of the last one too, which it ignores otherwise.
A written state is scaled by a power of two and back, which rounds nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernels

HUGE = 2.0**100  # exp(HUGE A) is 0 for every A below -1e-28

Slots = tuple[Tensor, Tensor, Tensor, Tensor]  # u, dt (b, p, m, e) and B, C (b, p, m, n) of m tokens at p places


def tiny(dtype: torch.dtype) -> float:
    """A step size, a power of two, in which nothing decays: exp(tiny A) rounds to 1 for A above -3e4."""
    return 2.0**-40 if dtype == torch.float32 else 2.0**-70


@dataclass
class _Piece:
    """`m` tokens at each of `p` places; which of the m gives y, and from which on n give the state."""

    slots: list[Slots]
    p: int
    m: int
    y: int | None
    read: int | None


class Program:
    """A sequence of real and virtual tokens, put together piece by piece, for one call of the scan.

    Args:
        u, dt: (b, l, e). A: (e, n). B, C: (b, l, n); all of one type, float32 or wider.
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor):
        self.real, self.A, self.n = (u, dt, B, C), A, A.shape[1]
        self.pieces: list[_Piece] = []
        self.eye = torch.eye(self.n, dtype=u.dtype, device=u.device)

    # -- what can follow ------------------------------------------------------------------------------------------

    def tokens(self, first: int, stop: int, *, added: Tensor | None = None, read: bool = False) -> None:
        """The real tokens first..stop-1.

        Args:
            added: (b, stop - first, e, n), added to the state of each before it is read. read: read each one's state.
        """
        s, p = slice(first, stop), stop - first
        slots: list[Slots] = [tuple(x[:, s, None] for x in self.real)]  # type: ignore[list-item]
        if added is not None:
            slots += [self._write(added), self._again(s)]
        y = self._width(slots) - 1
        self._put(p, slots + [self._read(p)] * read, y, y + 1 if read else None)

    def write(self, h: Tensor) -> None:
        """Add h (b, e, n) to the state."""
        self._put(1, [self._write(h[:, None])])

    def replace(self, t: int, h: Tensor) -> None:
        """In place of token t: forget the state, put h (b, e, n) there, and read y_t from it."""
        slots = [self._blank(1, 1, dt=HUGE), self._write(h[:, None]), self._again(slice(t, t + 1))]
        self._put(1, slots, self._width(slots) - 1)

    def read(self) -> None:
        """Read the state."""
        self._put(1, [self._read(1)], read=0)

    def run(self, kernels: Kernels) -> tuple[Tensor, Tensor | None, Tensor]:
        """One call of the kernel.

        Returns:
            y (b, l, e) of the real tokens; the states that were read (b, reads, e, n), None without any; and the last
            state (b, e, n), which has no gradient.
        """
        joined = (self._join(i) for i in range(4))
        u, dt, B, C = joined
        out, last = kernels.scan(u, dt, self.A, B, C)
        ys, states = [], []
        for piece, part in self._split(out):
            if piece.y is not None:
                ys.append(part[:, :, piece.y])
            if piece.read is not None:
                states.append(part[:, :, piece.read : piece.read + self.n].transpose(2, 3))  # (b, p, e, n)
        return _cat(ys), _cat(states) if states else None, last

    # -- its parts ------------------------------------------------------------------------------------------------

    def _put(self, p: int, slots: list[Slots], y: int | None = None, read: int | None = None) -> None:
        self.pieces.append(_Piece(slots, p, self._width(slots), y, read))

    def _width(self, slots: list[Slots]) -> int:
        return sum(u.shape[2] for u, *_ in slots)

    def _blank(self, p: int, m: int, dt: float = 0.0) -> Slots:
        """m tokens that neither write nor are read."""
        (b, _, e), u = self.real[0].shape, self.real[0]
        nothing, none = u.new_zeros(()).expand(b, p, m, e), u.new_zeros(()).expand(b, p, m, self.n)
        return nothing, u.new_full((), dt).expand(b, p, m, e), none, none

    def _write(self, h: Tensor) -> Slots:
        p, step = h.shape[1], tiny(self.A.dtype)
        _, dt, B, C = self._blank(p, self.n, dt=step)
        return h.transpose(2, 3) / step, dt, self.eye.expand_as(B), C

    def _again(self, s: slice) -> Slots:
        C = self.real[3][:, s, None]
        return *self._blank(C.shape[1], 1)[:3], C

    def _read(self, p: int) -> Slots:
        u, dt, B, C = self._blank(p, self.n)
        return u, dt, B, self.eye.expand_as(C)

    def _join(self, i: int) -> Tensor:
        """One of u, dt, B, C, of all tokens: (b, L, ·), laid out so that positions are contiguous."""
        parts = []
        for piece in self.pieces:
            at_place = torch.cat([s[i] for s in piece.slots], 2) if len(piece.slots) > 1 else piece.slots[0][i]
            parts.append(at_place.flatten(1, 2).transpose(1, 2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2)

    def _split(self, out: Tensor) -> Iterator[tuple[_Piece, Tensor]]:
        for piece, part in zip(self.pieces, out.split([q.p * q.m for q in self.pieces], 1), strict=True):
            yield piece, part.unflatten(1, (piece.p, piece.m))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
