"""The graph of a Mamba written out once more, node by node, in plain PyTorch: the truth that paths are judged by.

Nothing of the package but its weights is used. A node is (site, layer, position); `evaluate` computes every node from
what `message(sender, receiver, value)` makes of each of its inputs.
"""

import torch
from torch.nn import functional as F


def senders(config, node):
    """The inputs of a node."""
    site, i, t = node
    if site in ("x", "gate", "logits"):
        return [("embed", None, t), *(("mixer_out", j, t) for j in range(config.n_layer if i is None else i))]
    if site == "u":
        return [("x", i, s) for s in range(t - config.d_conv + 1, t + 1) if s >= 0]
    if site == "ssm_state":
        return [("state_write", i, t), ("decay", i, t), *([("ssm_state", i, t - 1)] if t else [])]
    names = {"dt": "u", "B": "u", "C": "u", "decay": "dt", "state_write": "u dt B", "y": "ssm_state C", "skip": "u",
             "mixer_out": "y skip gate"}  # fmt: skip
    return [(s, i, t) for s in names[site].split()]


def nodes(config, length):
    """All nodes but the embeddings, senders before receivers."""
    inner = ["x", "gate", "u", "dt", "B", "C", "decay", "state_write", "ssm_state", "y", "skip", "mixer_out"]
    found = [(site, i, t) for i in range(config.n_layer) for t in range(length) for site in inner]
    return found + [("logits", None, t) for t in range(length)]


def norm(module, x, eps):
    if hasattr(module, "bias") and module.bias is not None:  # LayerNorm
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * module.weight


def formula(model, node, got):
    """A node's value from its inputs: got maps each sender to what arrives."""
    site, i, t = node
    c = model.config
    if site == "logits":
        return norm(model.backbone.norm_f, sum(got.values()), c.norm_eps) @ model.lm_head.weight.T
    layer = model.backbone.layers[i]
    m = layer.mixer
    by = {name: v for (name, _, s), v in got.items() if s == t}  # those of this position
    if site in ("x", "gate"):
        both = norm(layer.norm, sum(got.values()), c.norm_eps) @ m.in_proj.weight.T
        both = both if m.in_proj.bias is None else both + m.in_proj.bias
        return both[..., : c.d_inner] if site == "x" else F.silu(both[..., c.d_inner :])
    if site == "u":
        conv = sum(v * m.conv1d.weight[:, 0, c.d_conv - 1 - (t - s)] for (_, _, s), v in got.items())
        return F.silu(conv if m.conv1d.bias is None else conv + m.conv1d.bias)
    r, n = c.rank, c.d_state
    parts = {"dt": slice(0, r), "B": slice(r, r + n), "C": slice(r + n, r + 2 * n)}
    if site in parts:
        low = by["u"] @ m.x_proj.weight[parts[site]].T
        if c.mixer_rms_eps is not None:
            low = low / (low.pow(2).mean(-1, keepdim=True) + c.mixer_rms_eps).sqrt()
        return F.softplus(low @ m.dt_proj.weight.T + m.dt_proj.bias) if site == "dt" else low
    if site == "decay":
        return torch.exp(by["dt"][..., None] * -torch.exp(m.A_log))
    if site == "state_write":
        return (by["dt"] * by["u"])[..., None] * by["B"][..., None, :]
    if site == "ssm_state":
        old = got.get(("ssm_state", i, t - 1))
        return by["state_write"] if old is None else by["decay"] * old + by["state_write"]
    if site == "y":
        return (by["ssm_state"] * by["C"][..., None, :]).sum(-1)
    if site == "skip":
        return m.D * by["u"]
    assert site == "mixer_out"
    out = ((by["y"] + by["skip"]) * by["gate"]) @ m.out_proj.weight.T
    return out if m.out_proj.bias is None else out + m.out_proj.bias


def evaluate(model, ids, message=None, fixed=None):
    """Every node's value. `fixed` nodes are not computed but have the value given."""
    values = {("embed", None, t): model.backbone.embedding.weight[ids[:, t]] for t in range(ids.shape[1])}
    for node in nodes(model.config, ids.shape[1]):
        if fixed and node in fixed:
            values[node] = fixed[node]
            continue
        got = {s: values[s] if message is None else message(s, node, values[s]) for s in senders(model.config, node)}
        values[node] = formula(model, node, got)
    return values


def logits(values):
    """(b, l, v) of the nodes' values."""
    return torch.stack([v for (site, _, _), v in values.items() if site == "logits"], 1)


def name(address):
    """An address as a node of this file."""
    return address.site, address.layer, address.pos
