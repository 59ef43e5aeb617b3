"""What holds tensors is printed in a line or a few, with their shapes."""

import dataclasses

import pytest
import torch
from helpers import tiny

import interp
from interp import at, patch_grid, run
from minimal_mamba.brief import Brief

MODEL = tiny(seed=3)
IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])


def test_a_run_its_memory_and_a_grid():
    made = run(MODEL, IDS, record=[at.y(layer=0)], keep_state=True)
    c = MODEL.config
    shown = repr(made)
    assert f"logits={str(made.logits.dtype)[6:]}[2, 4, {c.padded_vocab}]" in shown and "lengths=[4, 4]" in shown
    assert f"ssm_state={c.n_layer} of {str(made.logits.dtype)[6:]}[2, {c.d_inner}, {c.d_state}]" in repr(made.state)
    grid = patch_grid(MODEL, IDS, IDS.flip(0), site="y", metric=lambda logits: logits[:, -1, 0], progress=False)
    assert f"values={str(grid.values.dtype)[6:]}[{c.n_layer}, 4, 2], base=[" in repr(grid) and "site='y'" in repr(grid)
    assert all("\n" not in repr(one) for one in (made, made.state, grid))


@pytest.mark.parametrize("name", [n for n in interp.__all__ if dataclasses.is_dataclass(getattr(interp, n))])
def test_no_value_prints_a_screen_of_numbers(name):
    kind = getattr(interp, name)
    tensors = [f.name for f in dataclasses.fields(kind) if "Tensor" in str(f.type) and f.repr]
    generated = hasattr(kind.__repr__, "__wrapped__")  # by `dataclass`, which prints every number
    assert not (tensors and generated)
    if issubclass(kind, Brief):
        assert kind.__repr__ is Brief.__repr__
