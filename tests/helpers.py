"""Small models for the tests, under whose weights a fault in the scan shows in the logits."""

from typing import Any

import torch

from minimal_mamba import Mamba, MambaConfig


@torch.no_grad()
def lively(model: Mamba, seed: int = 0) -> Mamba:
    """Redraw every weight of the model, in place, so that the scan carries the logits; returns the model.

    B, C and u are of order one, memories last from one to some twenty tokens, the skip and the embedding are small
    beside what is read from the state, and no two channels, state dimensions or layers are alike. The draw is made in
    float64 from a generator of its own: the same seed and sizes give the same weights, rounded, in every type and on
    every device.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(weight: torch.Tensor, std: float, mean: float = 0.0) -> None:
        weight.copy_(mean + std * torch.randn(weight.shape, generator=rng, dtype=torch.float64))

    c = model.config
    normal(model.backbone.embedding.weight, c.d_model**-0.5)
    if not c.tie_embeddings:
        normal(model.lm_head.weight, c.d_model**-0.5)
    for layer in model.backbone.layers:
        m = layer.mixer
        normal(m.in_proj.weight, 1.5 * c.d_model**-0.5)
        normal(m.conv1d.weight, c.d_conv**-0.5)
        normal(m.x_proj.weight, 2 * c.d_inner**-0.5)
        normal(m.dt_proj.weight, 0.5 * c.rank**-0.5)
        normal(m.dt_proj.bias, 0.5, mean=-0.5)
        normal(m.A_log, 0.8, mean=-1.5)
        normal(m.D, 0.2, mean=0.2)
        normal(m.out_proj.weight, 2 * c.d_inner**-0.5)
        for bias in (m.in_proj.bias, m.conv1d.bias, m.out_proj.bias):
            if bias is not None:
                normal(bias, 0.1)
    for module in (model.backbone.norm_f, *(layer.norm for layer in model.backbone.layers)):
        normal(module.weight, 0.2, mean=1.0)
        if getattr(module, "bias", None) is not None:
            normal(module.bias, 0.1)
    return model


def tiny(*, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Mamba:
    """A lively float64 model whose sizes are pairwise distinct: v 32 (29 tokens), e 24, d 12, n 5, r 4, k and layers 3.

    Args:
        seed: of the weights. dtype: of the weights. overrides: fields of `MambaConfig`.
    """
    sizes: dict[str, Any] = {"d_model": 12, "n_layer": 3, "vocab_size": 29, "d_state": 5, "d_conv": 3, "dt_rank": 4}
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn from the global generator, then replaced
        model = Mamba(MambaConfig(**sizes | overrides))
    return lively(model.to(dtype), seed)
