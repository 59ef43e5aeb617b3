"""The implementations that are timed: ours by backend, and each peer with the same weights.

A peer offers kinds of work as methods that return what is checked before it is timed; what it does not offer it names
in `lacks`. Each holds weights of its own, so that none changes another's modules.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interp import Set, at, generate, patch_grid, run
from kernels_bridge.backends import BACKENDS, resolve
from kernels_bridge.harness.theirs import hf_cache
from minimal_mamba import Mamba

from .sweeps import Cell, hf_resid, hf_state, hf_twin

STATE, RESID = "ssm_state", "resid_post"  # the sites that are swept
ENVIRONMENTS = {  # name -> the peers that run in it; its packages are in peers.txt and lens.txt
    "peers": ("HF transformers", "HF use_mambapy", "mambapy sequential", "mambapy pscan", "TransformerLens", "nnsight"),
    "lens": ("MambaLens",),
}


class Peer:
    """One implementation: forward, states of every layer, cells of a sweep, decoding.

    Args:
        module: what is trained; its parameters hold the model's weights.
    """

    lacks: ClassVar[dict[str, str]] = {}  # kind of work -> why it is left out
    ours = False

    def __init__(self, module: nn.Module):
        self.module = module.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """(b, l) -> (b, l, v)."""
        raise NotImplementedError

    def states(self, ids: Tensor) -> list[Tensor]:
        """The state after every token: of each layer (b, l, e, n)."""
        raise NotImplementedError

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        """(layer, position) -> (b, v) last logits with the donor's value there.

        Args:
            donor, clean: the site in every layer (b, l, ...), of the donor's run and of this one.
        """
        raise NotImplementedError

    def decode(self, ids: Tensor, new: int) -> Tensor:
        """(b, l) -> (b, l + new), the likeliest tokens."""
        raise NotImplementedError


class Ours(Peer):
    """mambascope on one backend."""

    ours = True

    def __init__(self, model: Mamba, backend: str):
        super().__init__(model)
        self.model, self.backend, self.ops = model, backend, resolve(backend, model.device)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, ops=self.ops).logits

    def states(self, ids: Tensor) -> list[Tensor]:
        where = at.ssm_state(layer=slice(None), pos=slice(None))
        return list(run(self.model, ids, record=where, backend=self.backend).records[where])

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        """One run a cell; the sweep is `grid`."""
        where = getattr(at, site)

        def cell(layer: int, pos: int) -> Tensor:
            edit = Set(where(layer=layer, pos=pos), donor[layer][:, pos])
            return run(self.model, ids, edit, last_only=True, backend=self.backend).logits[:, 0]

        return cell

    def grid(self, site: str, ids: Tensor, donor_ids: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """The whole sweep, (layers, positions, b)."""
        return patch_grid(
            self.model, ids, donor_ids, site=site, metric=metric, backend=self.backend, progress=False
        ).values

    def decode(self, ids: Tensor, new: int) -> Tensor:
        return generate(self.model, ids, new, backend=self.backend, last_only=True).ids


class HF(Peer):
    """transformers' MambaForCausalLM without kernels: a loop over positions, or mambapy's parallel scan."""

    lacks: ClassVar = {"states": "keeps the last state only; nnsight reads the others from it"}

    def __init__(self, model: Mamba, **options: Any):
        self.hf = hf_twin(model, **options)
        super().__init__(self.hf)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hf(ids, use_cache=False).logits

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        return (hf_resid if site == RESID else hf_state)(self.hf, ids, donor)

    def decode(self, ids: Tensor, new: int) -> Tensor:
        out = self.hf(ids, use_cache=True)
        for i in range(new):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if i < new - 1:
                out = self.hf(token, use_cache=True, **hf_cache(out))
        return ids


class HFMambapy(HF):
    """transformers' MambaForCausalLM with `use_mambapy=True`."""

    lacks: ClassVar = {
        "states": "its parallel scan gives no states",
        STATE: "its parallel scan takes no state",
        RESID: "as HF transformers, with a slower scan",
        "decode": "decodes as HF transformers",
    }

    def __init__(self, model: Mamba):
        import mambapy.pscan  # noqa: F401  transformers falls back to its loop without a word

        super().__init__(model, use_mambapy=True)


class Mambapy(Peer):
    """mambapy's layers between our embedding, norm and head: its language model needs mamba_ssm to import."""

    lacks: ClassVar = {"states": "gives no states", STATE: "takes no state within a sequence"}
    pscan = False

    def __init__(self, model: Mamba):
        from mambapy.mamba import Mamba as Layers
        from mambapy.mamba import MambaConfig as Config

        c = model.config
        config = Config(d_model=c.d_model, n_layers=c.n_layer, d_state=c.d_state, expand_factor=int(c.expand),
                        d_conv=c.d_conv, pscan=self.pscan, rms_norm_eps=c.norm_eps)  # fmt: skip
        made: Any = nn.Module()
        made.embedding = nn.Embedding(c.padded_vocab, c.d_model)
        made.layers = Layers(config)
        made.norm_f = nn.RMSNorm(c.d_model, c.norm_eps)
        made.lm_head = nn.Linear(c.d_model, c.padded_vocab, bias=False)
        made.to(model.dtype)
        weights = {k.removeprefix("backbone."): v for k, v in model.state_dict().items()}
        made.load_state_dict({k.replace("layers.", "layers.layers.", 1): v for k, v in weights.items()})
        if c.tie_embeddings:
            made.lm_head.weight = made.embedding.weight
        super().__init__(made)

    def forward(self, ids: Tensor) -> Tensor:
        m: Any = self.module
        return m.lm_head(m.norm_f(m.layers(m.embedding(ids))))

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        m: Any = self.module

        def cell(layer: int, pos: int) -> Tensor:
            def put(module: nn.Module, args: object, out: Tensor) -> Tensor:
                out = out.clone()
                out[:, pos] = donor[layer][:, pos]
                return out

            handle = m.layers.layers[layer].register_forward_hook(put)
            try:
                return self.forward(ids)[:, -1]
            finally:
                handle.remove()

        return cell

    def decode(self, ids: Tensor, new: int) -> Tensor:
        m: Any = self.module
        c = m.layers.config
        inputs = torch.zeros(len(ids), c.d_inner, c.d_conv - 1, dtype=m.embedding.weight.dtype)
        caches = [(None, inputs)] * c.n_layers
        last = ids.shape[1] - 1
        for i in range(last + new):
            x, caches = m.layers.step(m.embedding(ids[:, i]), caches)
            if i >= last:
                token = m.lm_head(m.norm_f(x)).argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], 1)
        return ids


class MambapyPscan(Mambapy):
    """mambapy with its parallel scan."""

    lacks: ClassVar = Mambapy.lacks | {
        RESID: "as mambapy sequential, with a slower scan",
        "decode": "decodes as mambapy sequential",
    }
    pscan = True


class TransformerLens(Peer):
    """TransformerLens 4's bridge around HF's model, with the scan that has hooks (`eager_scan`).

    Every call says `use_cache=False`: with the cache that HF makes by default the scan's hooks do not fire.
    """

    lacks: ClassVar = {"decode": "generates through HF's model, without its hooks"}

    def __init__(self, model: Mamba):
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        hf = hf_twin(model)
        self.bridge: Any = build_bridge_from_module(hf, "MambaForCausalLM", hf_config=hf.config)
        for block in self.bridge.blocks:
            block.mixer.eager_scan = True
        super().__init__(self.bridge)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bridge(ids, use_cache=False)

    def states(self, ids: Tensor) -> list[Tensor]:
        _, cache = self.bridge.run_with_cache(
            ids, use_cache=False, names_filter=lambda name: name.endswith("hook_ssm_state")
        )
        return [cache[f"blocks.{i}.mixer.hook_ssm_state"].transpose(1, 2) for i in range(len(self.bridge.blocks))]

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        """A state is patched by what this token writes: its own hook of the state does not carry over."""
        name = "mixer.hook_ssm_write" if site == STATE else "hook_out"

        def cell(layer: int, pos: int) -> Tensor:
            def put(value: Tensor, hook: object) -> Tensor:
                value = value.clone()
                if site == STATE:
                    value[:, :, pos] += donor[layer][:, pos] - clean[layer][:, pos]
                else:
                    value[:, pos] = donor[layer][:, pos]
                return value

            hooks = [(f"blocks.{layer}.{name}", put)]
            return self.bridge.run_with_hooks(ids, use_cache=False, fwd_hooks=hooks)[:, -1]

        return cell


class NNsight(Peer):
    """nnsight around HF's model, whose scan it reaches line by line (`.source`)."""

    lacks: ClassVar = {"train": "trains HF's own module", "decode": "generates through HF's model"}

    def __init__(self, model: Mamba):
        import nnsight

        self.hf = hf_twin(model)
        self.sight: Any = nnsight.NNsight(self.hf)
        super().__init__(self.hf)

    def _state(self, layer: int) -> Any:
        call = self.sight.backbone.layers[layer].mixer.source.mamba_selective_scan_0
        return call.source.implementation_0.source.ssm_state_to_0

    def forward(self, ids: Tensor) -> Tensor:
        with self.sight.trace(ids, use_cache=False):
            logits = self.sight.output.logits.save()
        return logits

    def states(self, ids: Tensor) -> list[Tensor]:
        n = self.hf.config.num_hidden_layers
        found: list[Tensor] = []
        for _ in range(1):
            with self.sight.trace(ids, use_cache=False) as tracer:
                got = list().save()  # type: ignore[attr-defined]  # noqa: C408
                for layer in range(n):
                    op = self._state(layer)
                    for _step in tracer.iter[: ids.shape[1]]:
                        got.append(op.output)
            found = got
        return [torch.stack(found[i * ids.shape[1] : (i + 1) * ids.shape[1]], 1) for i in range(n)]

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        """A state is written in place: `.to` gives back the tensor that the next position reads."""

        def cell(layer: int, pos: int) -> Tensor:
            value = donor[layer][:, pos]
            if site == STATE:
                with self.sight.trace(ids, use_cache=False) as tracer:
                    op = self._state(layer)
                    for _step in tracer.iter[pos]:
                        op.output[:] = value
                    logits = self.sight.output.logits.save()
            else:
                with self.sight.trace(ids, use_cache=False):
                    self.sight.backbone.layers[layer].output[:, pos] = value
                    logits = self.sight.output.logits.save()
            return logits[:, -1]

        return cell


class MambaLens(Peer):
    """MambaLens on TransformerLens 3: a loop over positions with a hook at each."""

    lacks: ClassVar = {"decode": "has no cache: every token costs a whole forward"}

    def __init__(self, model: Mamba):
        from mamba_lens import HookedMamba
        from mamba_lens.HookedMamba import MambaCfg, convert_original_state_dict_to_hooked_state_dict

        c = model.config
        cfg = MambaCfg(c.d_model, c.n_layer, c.padded_vocab, d_state=c.d_state, expand=int(c.expand), dt_rank=c.rank,
                       d_conv=c.d_conv, device="cpu")  # fmt: skip
        self.lens: Any = HookedMamba(cfg, None)
        self.lens.load_state_dict(convert_original_state_dict_to_hooked_state_dict(cfg, model.state_dict()))
        if c.tie_embeddings:
            self.lens.lm_head.weight = self.lens.embedding.weight
        super().__init__(self.lens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lens(ids)

    def states(self, ids: Tensor) -> list[Tensor]:
        n, l = self.lens.cfg.n_layers, ids.shape[1]
        names = [[f"blocks.{i}.hook_h.{t}" for t in range(l)] for i in range(n)]
        _, cache = self.lens.run_with_cache(ids, names_filter=[name for layer in names for name in layer])
        return [torch.stack([cache[name] for name in layer], 1) for layer in names]

    def cell(self, site: str, ids: Tensor, donor: Mapping[int, Tensor], clean: Mapping[int, Tensor]) -> Cell:
        def cell(layer: int, pos: int) -> Tensor:
            def put(value: Tensor, hook: object) -> Tensor:
                if site == STATE:
                    return donor[layer][:, pos]
                value = value.clone()
                value[:, pos] = donor[layer][:, pos]
                return value

            name = f"hook_h.{pos}" if site == STATE else "hook_resid_post"
            return self.lens.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.{name}", put)])[:, -1]

        return cell


KINDS: dict[str, Callable[[Mamba], Peer]] = {
    "HF transformers": HF,
    "HF use_mambapy": HFMambapy,
    "mambapy sequential": Mambapy,
    "mambapy pscan": MambapyPscan,
    "TransformerLens": TransformerLens,
    "nnsight": NNsight,
    "MambaLens": MambaLens,
}


def ours_here() -> list[str]:
    """Our backends that run on the CPU here; the readable one is what they are held against, and is not timed."""
    return [b.name for b in BACKENDS.values() if b.name != "reference" and not b.missing(torch.device("cpu"))]


def peers(model: Mamba, kind: str, only: tuple[str, ...] = tuple(KINDS)) -> tuple[dict[str, Peer], dict[str, str]]:
    """Ours and the peers that offer a kind of work; and of those left out, why."""
    made: dict[str, Peer] = {f"mambascope {backend}": Ours(model, backend) for backend in ours_here()}
    left: dict[str, str] = {}
    for name in only:
        reason = getattr(KINDS[name], "lacks", {}).get(kind)
        if reason is None:
            try:
                made[name] = KINDS[name](model)
                continue
            except ImportError as e:
                reason = f"cannot be imported: {e}"
        left[name] = reason
    return made, left
