"""SITES: the one table of places in the model that can be read and edited.

A site has a name, axes and a meaning. `b` batch, `l` position, `d` d_model, `e` d_inner, `n` d_state, `r` dt_rank,
`k` d_conv, `v` vocabulary. A site without an `l` axis lives inside the recurrence: it exists once per position, and
the forward offers it one position at a time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place: its axes (recorded over all positions, `l` follows `b`), whether each layer has one, its meaning."""

    name: str
    axes: str
    layered: bool
    meaning: str

    @property
    def per_position(self) -> bool:
        """Whether it exists one position at a time, inside the conv or the scan."""
        return "l" not in self.axes.split()

    @property
    def features(self) -> tuple[str, ...]:
        """The axes that follow batch and position."""
        return tuple(a for a in self.axes.split() if a not in "bl")


_ROWS: list[tuple[str, str, bool, str]] = [
    ("embed", "b l d", False, "token embedding: the residual stream before layer 0"),
    ("resid_pre", "b l d", True, "residual stream as it enters the layer"),
    ("mixer_in", "b l d", True, "normalised input of the mixer; edits do not touch the residual stream"),
    ("x", "b l e", True, "first half of in_proj, before the conv"),
    ("z", "b l e", True, "second half of in_proj: the gate before SiLU"),
    ("conv", "b l e", True, "conv output before SiLU"),
    ("conv_state", "b e k", True, "last k conv inputs after this token, newest last; edits change later tokens only"),
    ("u", "b l e", True, "SSM input, SiLU(conv)"),
    ("dt_low", "b l r", True, "step size before dt_proj"),
    ("dt", "b l e", True, "step size after bias and softplus, > 0"),
    ("B", "b l n", True, "input-dependent write direction"),
    ("C", "b l n", True, "input-dependent read direction"),
    ("decay", "b e n", True, "exp(dt A): how much of the old state is kept"),
    ("state_write", "b e n", True, "dt B u: what this token writes"),
    ("ssm_state", "b e n", True, "h_t after this token's write, before it is read; edits change y_t and propagate"),
    ("state_read", "b e n", True, "the copy of h_t that y_t is read from; edits change y_t only"),
    ("y", "b l e", True, "C h: what is read from the state"),
    ("skip", "b l e", True, "D u"),
    ("ssm_out", "b l e", True, "y + skip"),
    ("gate", "b l e", True, "SiLU(z)"),
    ("gated", "b l e", True, "ssm_out times gate"),
    ("mixer_out", "b l d", True, "what the layer adds to the residual stream, after out_proj"),
    ("resid_post", "b l d", True, "residual stream as it leaves the layer"),
    ("final_norm", "b l d", False, "residual stream after the last norm"),
    ("logits", "b l v", False, "scores of the next token"),
]

SITES: dict[str, Site] = {name: Site(name, axes, layered, meaning) for name, axes, layered, meaning in _ROWS}

# The whole memory of a layer: `ssm_state` and `conv_state` side by side along the last axis, n values then k.
# It is an address of two sites rather than a site: the forward offers each at its own time.
RECURRENT_STATE = Site("recurrent_state", "b e n+k", True, "ssm_state, then conv_state: all that a layer remembers")
ADDRESSABLE: dict[str, Site] = SITES | {RECURRENT_STATE.name: RECURRENT_STATE}
