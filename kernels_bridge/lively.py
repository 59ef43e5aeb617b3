"""Weights under which a fault in the scan shows: most random ones leave a check half blind."""

import torch

from minimal_mamba import Mamba


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
    for norm in (model.backbone.norm_f, *(layer.norm for layer in model.backbone.layers)):
        for name, parameter in norm.named_parameters():
            normal(parameter, *((0.2, 1.0) if name == "weight" else (0.1,)))
    return model
