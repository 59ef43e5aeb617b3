"""The graph of a Mamba: its nodes are sites at one layer and position, its edges where one is an input of another.

    residual stream    embed_t, and mixer_out_t of every earlier layer  ->  x_t and gate_t of a layer, and logits_t
    convolution        x_s -> u_t    for s = t-k+1 .. t: one edge a conv tap
    selection          u_t -> dt_t, B_t, C_t        dt_t -> decay_t
    write              u_t, dt_t, B_t -> state_write_t                (dt B u)
    state              state_write_t, decay_t, ssm_state_{t-1} -> ssm_state_t
    read               ssm_state_t, C_t -> y_t                        (C h)
    output             u_t -> skip_t (D u)        y_t, skip_t, gate_t -> mixer_out_t = out_proj((y + skip) gate)

Tokens meet in two places only: the conv's taps, and ssm_state_{t-1} -> ssm_state_t. Norm, in_proj, SiLU and out_proj
belong to the node that they make, so `x` is norm and in_proj of the residual stream, and `u` is SiLU of the conv. A
node is written as an address: `Edge(at.x(layer=0, pos=3), at.u(layer=0, pos=4))`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minimal_mamba import Address, MambaConfig, at
from minimal_mamba.address import EVERYTHING, address_of, resolve, selector
from minimal_mamba.errors import EditError, InputError, of_type

RESIDUAL = ("x", "gate", "logits")  # what reads the residual stream; embed and mixer_out write to it
INPUTS: dict[str, tuple[str, ...]] = {
    "x": ("embed", "mixer_out"),
    "gate": ("embed", "mixer_out"),
    "u": ("x",),
    "dt": ("u",),
    "B": ("u",),
    "C": ("u",),
    "decay": ("dt",),
    "state_write": ("u", "dt", "B"),
    "ssm_state": ("state_write", "decay", "ssm_state"),
    "y": ("ssm_state", "C"),
    "skip": ("u",),
    "mixer_out": ("y", "skip", "gate"),
    "logits": ("embed", "mixer_out"),
}
NODES = ("embed", *INPUTS)  # in the order in which a layer computes them
Group = tuple[str, int | None, str, int | None, int]  # sender's site and layer, receiver's, and how many tokens later


@dataclass(frozen=True)
class Edge:
    """The place where one node's value is an input of another.

    Args:
        sender, receiver: addresses of one layer (where the site has one) and one position, counted from 0.
    Raises:
        EditError: no nodes, or no edge of the graph; the text says which edges lead there.
    """

    sender: Address
    receiver: Address

    def __post_init__(self) -> None:
        for node in (self.sender, self.receiver):
            _check(node)
        s, r, lag = self.sender, self.receiver, self.lag
        if s.site not in INPUTS.get(r.site, ()):
            known = ", ".join(INPUTS.get(r.site, ())) or "nothing"
            raise EditError(f"{self} is no edge: the inputs of {r.site} are {known}.")
        if r.site in RESIDUAL:
            top = _layer(r)
            below = s.site == "embed" or top is None or (_layer(s) or 0) < top
            if lag or not below:
                raise EditError(f"{self} is no edge: the residual stream carries it up one position's layers.")
        elif s.layer != r.layer:
            raise EditError(f"{self} is no edge: layers meet in the residual stream only, at x, gate and logits.")
        elif (s.site == "x" and lag < 0) or (s.site != "x" and lag != (s.site == r.site == "ssm_state")):
            raise EditError(f"{self} is no edge: only conv taps and ssm_state, by one token, lead to a later position.")

    @property
    def lag(self) -> int:
        """How many tokens the receiver is behind the sender."""
        return position(self.receiver) - position(self.sender)

    @property
    def group(self) -> Group:
        """What it shares with the same edge of other positions."""
        return self.sender.site, _layer(self.sender), self.receiver.site, _layer(self.receiver), self.lag

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"

    __repr__ = __str__


def position(node: Address) -> int:
    """A node's position."""
    assert isinstance(node.pos, int)
    return node.pos


def _layer(node: Address) -> int | None:
    assert node.layer is None or isinstance(node.layer, int)
    return node.layer


def _check(node: Address) -> None:
    if not isinstance(node, Address):
        raise EditError(f"{node!r} is no address; a node is at.<site>(layer=, pos=).")
    if node.site not in NODES:
        raise EditError(f"{node}: {node.site} is no node of the graph; nodes are {', '.join(NODES)}.")
    ints = [i for i in (node.layer, node.pos) if i is not None]
    if not all(isinstance(i, int) and i >= 0 for i in ints) or any(f != EVERYTHING for f in node.features):
        raise EditError(f"{node}: a node is one layer and one position, counted from 0, with all its channels.")


def node(site: str, layer: int | None, pos: int) -> Address:
    """The address of a node."""
    return address_of(site, layer, pos=pos)


def order(edge: Edge) -> tuple[int, int, int, int, int, int]:
    """Sort key: by receiver, in the order in which the forward computes it, then by sender."""
    far = 1 << 30
    r, s = edge.receiver, edge.sender
    up = far if r.layer is None else _layer(r) or 0
    return up, NODES.index(r.site), position(r), NODES.index(s.site), _layer(s) or 0, position(s)


def edges(
    config: MambaConfig,
    length: int,
    *,
    positions: int | slice | Sequence[int] | None = None,
    layers: int | slice | Sequence[int] | None = None,
    receivers: Sequence[str] | None = None,
    senders: Sequence[str] | None = None,
) -> list[Edge]:
    """The edges of the graph of a model on `length` tokens.

    Args:
        positions, layers: of the receivers, as in `at`; all if None. logits, of no layer, count as one more above the
            last and are left out where `layers` names some.
        receivers, senders: the sites to keep, as `NODES` names them; all if None.
    Returns:
        Edges in the order in which the forward computes their receivers. With i counting layers from 0 a position
        has 2 (i + 1) + k + 16 edges in layer i, and n_layer + 1 into its logits.
    """
    of_type("config", config, MambaConfig, "of a model, model.config")
    for site in [*(receivers or ()), *(senders or ())]:
        if site not in NODES:
            raise InputError(f"{site!r} is no node of the graph; nodes are {', '.join(NODES)}.")
    where = resolve(selector(slice(None) if positions is None else positions, "pos"), length, "pos")
    which = resolve(selector(slice(None) if layers is None else layers, "layer"), config.n_layer, "layer")
    places: list[int | None] = [*which, *([None] if layers is None else [])]
    found = []
    for i in places:
        for site in (s for s in INPUTS if (s == "logits") == (i is None)):
            if receivers is not None and site not in receivers:
                continue
            for t in where:
                sent = [s for s in _inputs(config, site, i, t) if senders is None or s.site in senders]
                found += [Edge(s, node(site, i, t)) for s in sent]
    return found


def _inputs(config: MambaConfig, site: str, i: int | None, t: int) -> list[Address]:
    """The senders of all edges into a node."""
    if site in RESIDUAL:
        return [at.embed(pos=t), *(at.mixer_out(layer=j, pos=t) for j in range(config.n_layer if i is None else i))]
    if site == "u":
        return [at.x(layer=i, pos=s) for s in range(max(0, t - config.d_conv + 1), t + 1)]
    back = {"ssm_state": 1} if site == "ssm_state" else {}
    return [node(s, i, t - back.get(s, 0)) for s in INPUTS[site] if t >= back.get(s, 0)]
