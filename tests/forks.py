"""Modules as a user would hand them to the harness: right ones, and forks with one fault each; and how it is asked."""

import torch

from kernels_bridge import resolve
from kernels_bridge.harness import Ours, check
from kernels_bridge.harness.draw import draw_model
from kernels_bridge.harness.targets import transformers_model
from minimal_mamba import MambaConfig, Ops
from minimal_mamba.scan import selective_scan
from minimal_mamba.tap import NO_TAP

CONFIG = MambaConfig(d_model=12, n_layer=2, vocab_size=29, d_state=5, d_conv=3, dt_rank=4, pad_vocab_size_multiple=1)


def model(dtype=torch.float32, seed=0):
    return draw_model(CONFIG, seed).to(dtype)


def tf32(x):
    """Round to the ten bits that a TF32 product reads."""
    short = (x.detach().view(torch.int32) + 0x1000).bitwise_and(~0x1FFF).view(torch.float32)
    return x + (short - x).detach()


def with_tf32():
    theirs = transformers_model(model())
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (tf32(args[0].contiguous()),))
    return theirs


def with_a_slip():
    """One number wrong: layer 1, position 4, the third channel of B."""
    theirs = transformers_model(model())

    def slip(module, args, out):
        if out.shape[1] > 4:  # not in decoding
            out = out.clone()
            out[2, 4, CONFIG.rank + 2] += 0.1
        return out

    theirs.backbone.layers[1].mixer.x_proj.register_forward_hook(slip)
    return theirs


def plain():
    return transformers_model(model())


def other_weights():
    return transformers_model(model(seed=1))


def nothing():
    return 3


def compiled():
    return torch.compile(plain())


def raises():
    raise RuntimeError("no weights here")


def in_a_tuple():
    theirs = plain()
    inner = theirs.forward
    theirs.forward = lambda *args, **kwargs: tuple(inner(*args, **kwargs).values())
    return theirs


def without_a_cache():
    theirs = plain()
    theirs.register_forward_hook(lambda module, args, out: out.__class__(logits=out.logits))
    return theirs


def mixer_in_a_tuple():
    theirs = plain()
    for layer in theirs.backbone.layers:
        mixer, inner = layer.mixer, layer.mixer.forward
        mixer.forward = lambda *args, inner=inner, **kwargs: (inner(*args, **kwargs), None)

        def forward(hidden_states, layer=layer, **more):
            normal = layer.norm(hidden_states.to(layer.norm.weight.dtype))
            given = {k: v for k, v in more.items() if k in ("cache", "cache_params", "attention_mask")}
            return hidden_states + layer.mixer(normal, **given)[0]

        layer.forward = forward
    return theirs


def faulty(**ops):
    """`torch`, with one operation exchanged for a faulty one."""
    good = resolve("torch")
    return Ours(model(), Ops("faulty", ops.get("conv", good.conv), ops.get("scan", good.scan)))


def failed(report):
    return {r.quantity for r in report.rows if not r.passed}


def ask(implementation, weights=None, **how):
    return check(implementation, weights or model(), lengths=[5, 17], progress=False, **how)


def swapped(u, dt, A, B, C, h, *, tap=NO_TAP):
    return selective_scan(u, dt, A, C, B, h, tap=tap)
