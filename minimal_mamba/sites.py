"""SITES: the one table of places in the model that can be read and edited.

A site has a name, axes and a meaning. `b` batch, `l` position, `d` d_model, `e` d_inner, `n` d_state, `r` dt_rank,
`k` d_conv, `v` vocabulary. A site without an `l` axis lives inside the recurrence: it exists once per position, and
the forward offers it one position at a time.
"""

from dataclasses import dataclass
from typing import Literal

Owner = Literal["model", "block", "conv", "scan"]


@dataclass(frozen=True)
class Site:
    """One place: its axes (recorded over all positions, `l` follows `b`), its owner and its meaning."""

    name: str
    axes: str
    owner: Owner  # which part of the forward offers it
    meaning: str

    @property
    def layered(self) -> bool:
        """Whether every layer has one."""
        return self.owner != "model"

    @property
    def per_position(self) -> bool:
        """Whether it exists one position at a time, inside the conv or the scan."""
        return "l" not in self.axes.split()

    @property
    def features(self) -> tuple[str, ...]:
        """The axes that follow batch and position."""
        return tuple(a for a in self.axes.split() if a not in "bl")


_ROWS: list[tuple[str, str, Owner, str]] = [
    ("embed", "b l d", "model", "token embedding: the residual stream before layer 0"),
    ("resid_pre", "b l d", "block", "residual stream as it enters the layer"),
    ("mixer_in", "b l d", "block", "normalised input of the mixer; edits do not touch the residual stream"),
    ("x", "b l e", "block", "first half of in_proj, before the conv"),
    ("z", "b l e", "block", "second half of in_proj: the gate before SiLU"),
    ("conv", "b l e", "block", "conv output before SiLU"),
    ("conv_state", "b e k", "conv", "last k conv inputs after this token, newest last; edits change later tokens only"),
    ("u", "b l e", "block", "SSM input, SiLU(conv)"),
    ("dt_low", "b l r", "block", "step size before dt_proj"),
    ("dt", "b l e", "block", "step size after bias and softplus, > 0"),
    ("B", "b l n", "block", "input-dependent write direction"),
    ("C", "b l n", "block", "input-dependent read direction"),
    ("decay", "b e n", "scan", "exp(dt A): how much of the old state is kept"),
    ("state_write", "b e n", "scan", "dt B u: what this token writes"),
    ("ssm_state", "b e n", "scan", "h_t after this token's write, before it is read; edits change y_t and propagate"),
    ("state_read", "b e n", "scan", "the copy of h_t that y_t is read from; edits change y_t only"),
    ("y", "b l e", "block", "C h: what is read from the state"),
    ("skip", "b l e", "block", "D u"),
    ("ssm_out", "b l e", "block", "y + skip"),
    ("gate", "b l e", "block", "SiLU(z)"),
    ("gated", "b l e", "block", "ssm_out times gate"),
    ("mixer_out", "b l d", "block", "what the layer adds to the residual stream, after out_proj"),
    ("resid_post", "b l d", "block", "residual stream as it leaves the layer"),
    ("final_norm", "b l d", "model", "residual stream after the last norm"),
    ("logits", "b l v", "model", "scores of the next token"),
]

SITES: dict[str, Site] = {name: Site(name, axes, owner, meaning) for name, axes, owner, meaning in _ROWS}

# The whole memory of a layer: `ssm_state` and `conv_state` side by side along the last axis, n values then k.
# It is an address of two sites rather than a site: the forward offers each at its own time.
RECURRENT_STATE = Site("recurrent_state", "b e n+k", "block", "ssm_state, then conv_state: all that a layer remembers")
ADDRESSABLE: dict[str, Site] = SITES | {RECURRENT_STATE.name: RECURRENT_STATE}
