"""Every site at every layer and position against a Mamba written here in numpy: plain loops, float64, no torch."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny

from interp import Run, at, run
from minimal_mamba import SITES, Mamba, MambaConfig, MambaState

Array = np.ndarray
BACKENDS = ("reference", "torch")
ATOL = 1e-10  # states reach 100 here; measured a few 1e-12

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True, "conv_bias": True},
    "no conv bias": {"conv_bias": False, "d_conv": 4},
    "layernorm, untied": {"rms_norm": False, "tie_embeddings": False, "bias": True},
    "d_conv 1, d_state 1": {"d_conv": 1, "d_state": 1},
    "d_conv 2, dt_rank 1": {"d_conv": 2, "dt_rank": 1},
    "d_conv 4, rank auto, large eps": {"d_conv": 4, "dt_rank": "auto", "d_model": 20, "norm_eps": 0.1},
    "expand 1.5, one layer": {"expand": 1.5, "n_layer": 1, "residual_in_fp32": False},
    "FalconMamba, an eps that shows": {"mixer_rms_eps": 0.3},
}


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def norm(x: Array, w: dict[str, Array], name: str, c: MambaConfig) -> Array:
    if c.rms_norm:
        return x / np.sqrt(np.mean(x * x) + c.norm_eps) * w[f"{name}.weight"]
    x = x - x.mean()
    return x / np.sqrt(np.mean(x * x) + c.norm_eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def mamba_row(w: dict[str, Array], c: MambaConfig, ids: list[int], h: Array, window: Array) -> dict[str, Array]:
    """One row, token by token: every site, (layers, l, ...) or (l, ...), from states (layers, e, n), (layers, e, k)."""
    h, window = h.copy(), window.copy()
    seen: dict[str, Any] = {s.name: [[] for _ in range(c.n_layer)] if s.layered else [] for s in SITES.values()}
    e, n, k, r = c.d_inner, c.d_state, c.d_conv, c.rank
    zeros_e, zeros_d = np.zeros(e), np.zeros(c.d_model)
    for token in ids:
        x_t = w["backbone.embedding.weight"][token]
        seen["embed"].append(x_t)
        for i in range(c.n_layer):
            p, m = f"backbone.layers.{i}", f"backbone.layers.{i}.mixer"
            v: dict[str, Array] = {"resid_pre": x_t}
            v["mixer_in"] = norm(x_t, w, f"{p}.norm", c)
            both = w[f"{m}.in_proj.weight"] @ v["mixer_in"] + w.get(f"{m}.in_proj.bias", np.zeros(2 * e))
            v["x"], v["z"] = both[:e], both[e:]
            conv = w.get(f"{m}.conv1d.bias", zeros_e).copy()
            for j in range(k):  # newest input meets the last weight
                past = v["x"] if j == 0 else window[i, :, k - j]
                conv += w[f"{m}.conv1d.weight"][:, 0, k - 1 - j] * past
            for j in range(k - 1):
                window[i, :, j] = window[i, :, j + 1]
            window[i, :, k - 1] = v["x"]
            v["conv_state"], v["conv"], v["u"] = window[i].copy(), conv, silu(conv)
            low = w[f"{m}.x_proj.weight"] @ v["u"]
            v["dt_low"], v["B"], v["C"] = low[:r], low[r : r + n], low[r + n :]
            if c.mixer_rms_eps is not None:
                for part in ("dt_low", "B", "C"):
                    v[part] = v[part] / np.sqrt(np.mean(v[part] ** 2) + c.mixer_rms_eps)
            v["dt"] = softplus(w[f"{m}.dt_proj.weight"] @ v["dt_low"] + w[f"{m}.dt_proj.bias"])
            v["decay"], v["state_write"] = np.zeros((e, n)), np.zeros((e, n))
            for ch in range(e):
                for s in range(n):
                    v["decay"][ch, s] = np.exp(-v["dt"][ch] * np.exp(w[f"{m}.A_log"][ch, s]))
                    v["state_write"][ch, s] = v["dt"][ch] * v["B"][s] * v["u"][ch]
            h[i] = v["decay"] * h[i] + v["state_write"]
            v["ssm_state"], v["state_read"] = h[i].copy(), h[i].copy()
            v["y"] = h[i] @ v["C"]
            v["skip"] = w[f"{m}.D"] * v["u"]
            v["ssm_out"] = v["y"] + v["skip"]
            v["gate"] = silu(v["z"])
            v["gated"] = v["ssm_out"] * v["gate"]
            v["mixer_out"] = w[f"{m}.out_proj.weight"] @ v["gated"] + w.get(f"{m}.out_proj.bias", zeros_d)
            x_t = v["resid_post"] = x_t + v["mixer_out"]
            for name, value in v.items():
                seen[name][i].append(value)
        final = norm(x_t, w, "backbone.norm_f", c)
        seen["final_norm"].append(final)
        seen["logits"].append(w["lm_head.weight"] @ final)
    return {name: np.array(value) for name, value in seen.items()}


def mamba(model: Mamba, ids: torch.Tensor, lengths: list[int], state: MambaState | None) -> dict[str, Array]:
    """Each row alone, stacked: (layers, b, l, ...) or (b, l, ...), zero where a row has no token."""
    c, b = model.config, len(ids)
    w = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    h, window = np.zeros((c.n_layer, b, c.d_inner, c.d_state)), np.zeros((c.n_layer, b, c.d_inner, c.d_conv))
    if state is not None:
        h = np.stack([s.numpy() for s in state.ssm_state])
        window = np.stack([s.numpy() for s in state.conv_state])
    rows = [mamba_row(w, c, ids[i, :size].tolist(), h[:, i], window[:, i]) for i, size in enumerate(lengths)]
    out = {}
    for site in SITES.values():
        lead = 1 if site.layered else 0
        padded = []
        for row in rows:
            value = row[site.name]
            pad = [(0, 0)] * value.ndim
            pad[lead] = (0, ids.shape[1] - value.shape[lead])
            padded.append(np.pad(value, pad, constant_values=np.nan))  # recordings of what a row lacks
        out[site.name] = np.stack(padded, axis=lead)
    return out


def random_state(model: Mamba, position: list[int], seed: int = 9) -> MambaState:
    g, c, b = torch.Generator().manual_seed(seed), model.config, len(position)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    layers = range(c.n_layer)
    h = tuple(draw(b, c.d_inner, c.d_state) for _ in layers)
    return MambaState(h, tuple(draw(b, c.d_inner, c.d_conv) for _ in layers), torch.tensor(position))


def compare(got: Run, want: dict[str, Array], lengths: list[int]) -> None:
    for name in SITES:
        address = getattr(at, name)()
        found = got[address].numpy()
        assert found.shape == want[name].shape, name
        assert (np.isnan(found) == np.isnan(want[name])).all(), name
        error = np.nan_to_num(np.abs(found - want[name]))
        worst = np.unravel_index(error.argmax(), error.shape)
        assert error.max() < ATOL, f"{name}: off by {error.max():.1e} at {worst} of (layer, row, position, ...)"
    np.testing.assert_allclose(got.logits.numpy(), np.nan_to_num(want["logits"]), rtol=0, atol=ATOL)
    assert got.state is not None
    for i, (h, window) in enumerate(zip(got.state.ssm_state, got.state.conv_state, strict=True)):
        for row, size in enumerate(lengths):
            np.testing.assert_allclose(h[row].numpy(), want["ssm_state"][i, row, size - 1], rtol=0, atol=ATOL)
            np.testing.assert_allclose(window[row].numpy(), want["conv_state"][i, row, size - 1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("case", ["clean", "carried", "padded", "padded and carried"])
@torch.no_grad()
def test_every_site_equals_numpy(name: str, case: str, backend: str) -> None:
    model = tiny(seed=3, **CONFIGS[name])
    ids = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths = [7, 1, 4] if "padded" in case else [7, 7, 7]
    state = random_state(model, [5, 0, 2]) if "carried" in case else None
    record = [getattr(at, site)() for site in SITES]
    got = run(
        model, ids, record=record, backend=backend, state=state, keep_state=True,
        lengths=lengths if "padded" in case else None,
    )  # fmt: skip
    assert got.backend == backend
    compare(got, mamba(model, ids, lengths, state), lengths)
    assert got.state is not None
    start = [5, 0, 2] if state else [0, 0, 0]
    assert got.state.position.tolist() == [s + size for s, size in zip(start, lengths, strict=True)]


@torch.no_grad()
def test_the_numpy_model_feels_its_state_and_its_window() -> None:
    """Control: the comparison has something to see, since memory moves the logits by much of their norm."""
    model = tiny(seed=3)
    ids = torch.randint(0, 29, (1, 7), generator=torch.Generator().manual_seed(1))
    want = mamba(model, ids, [7], None)["logits"]
    for field in ("ssm_state", "conv_state"):
        carried = random_state(model, [0])
        other = tuple(torch.zeros_like(s) for s in getattr(carried, field))
        cleared = MambaState(**{**vars(carried), field: other})
        moved = np.linalg.norm(mamba(model, ids, [7], cleared)["logits"] - want) / np.linalg.norm(want)
        assert moved > 0.1, field
