"""Inputs that the model cannot run: each is refused in a sentence that says what was asked and what is true."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from minimal_mamba import Mamba, MambascopeError, MambaState
from minimal_mamba.errors import ConfigError, InputError

MODEL = tiny()
IDS = torch.randint(0, 29, (2, 4), generator=torch.Generator().manual_seed(0))


def state_with(**changed: Any) -> MambaState:
    return MambaState(**{**vars(MODEL.initial_state(2)), **changed})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "one axis": (lambda: MODEL(torch.tensor([1, 2, 3])), r"ids has shape \(3,\); it is \(batch, length\)"),
    "three axes": (lambda: MODEL(IDS[None]), r"ids has shape \(1, 2, 4\)"),
    "no row": (lambda: MODEL(IDS[:0]), r"ids has shape \(0, 4\).*at least one token"),
    "no token": (lambda: MODEL(IDS[:, :0]), r"ids has shape \(2, 0\).*at least one token"),
    "float ids": (lambda: MODEL(IDS.double()), r"ids has type torch.float64; token ids are integers"),
    "bool ids": (lambda: MODEL(IDS > 3), r"ids has type torch.bool"),
    "negative id": (lambda: MODEL(torch.tensor([[3, -1]])), r"token id -1 is outside the vocabulary 0\.\.28\.$"),
    "padding row": (lambda: MODEL(torch.tensor([[3, 29]])), r"token id 29 is .* \(rows up to 31 are padding\)"),
    "beyond all rows": (lambda: MODEL(torch.tensor([[3, 32]])), r"token id 32 is outside the vocabulary 0\.\.28\.$"),
    "bad id on padding": (lambda: MODEL(torch.tensor([[3, 99]]), lengths=[1]), r"token id 99 is outside"),
    "length 0": (lambda: MODEL(IDS, lengths=[4, 0]), r"lengths=\[4, 0\]: give one int of 1\.\.4 a row, for 2 rows"),
    "a mask for lengths": (lambda: MODEL(IDS, lengths=torch.ones_like(IDS)), r"give one int .*its \.sum\(1\)"),
    "length too long": (lambda: MODEL(IDS, lengths=[5, 4]), r"lengths=\[5, 4\]: give one int of 1\.\.4"),
    "one length for two rows": (lambda: MODEL(IDS, lengths=[4]), r"lengths=\[4\].*for 2 rows"),
    "lengths of two axes": (lambda: MODEL(IDS, lengths=[[4, 4]]), r"lengths=\[\[4, 4\]\]"),
    "ragged ids": (lambda: MODEL([[1, 2], [3]]), r"ids is no rectangular array of integers"),
    "text": (lambda: MODEL("1 2"), r"ids is no rectangular array of integers"),
    "complex ids": (lambda: MODEL(IDS.to(torch.complex64)), r"ids has type torch.complex64; token ids are integers"),
    "bool lengths": (lambda: MODEL(IDS, lengths=[True, True]), r"lengths=\[True, True\] has type torch.bool"),
    "float lengths": (
        lambda: MODEL(IDS, lengths=[4.0, 3.0]),
        r"lengths=\[4\.0, 3\.0\] has type torch.float32; give one int",
    ),
    "state of another batch": (
        lambda: MODEL(IDS, state=MODEL.initial_state(3)),
        r"state.ssm_state has shapes \[\(3, 24, 5\).*this run has \(2, 24, 5\) in 3",
    ),
    "state of fewer layers": (
        lambda: MODEL(IDS, state=tiny(n_layer=2).initial_state(2)),
        r"state.ssm_state .* in 2 layers; this run has \(2, 24, 5\) in 3",
    ),
    "state of another conv": (
        lambda: MODEL(IDS, state=state_with(conv_state=(torch.zeros(2, 24, 4),) * 3)),
        r"state.conv_state has shapes \[\(2, 24, 4\).*this run has \(2, 24, 3\)",
    ),
}


MODEL32, MODEL16 = tiny(dtype=torch.float32), tiny(dtype=torch.bfloat16)
BAD |= {
    "state of another type": (
        lambda: MODEL(IDS, state=MODEL32.initial_state(2)),
        r"state.ssm_state of layer 0 is torch.float32 on cpu; this model carries torch.float64 on cpu",
    ),
    "state in 16 bits": (
        lambda: MODEL16(
            IDS, state=replace(MODEL16.initial_state(2), ssm_state=(torch.zeros(2, 24, 5).bfloat16(),) * 3)
        ),
        r"state.ssm_state of layer 0 is torch.bfloat16 on cpu; this model carries torch.float32 on cpu",
    ),
    "conv state of another type": (
        lambda: MODEL16(IDS, state=replace(MODEL16.initial_state(2), conv_state=(torch.zeros(2, 24, 3),) * 3)),
        r"state.conv_state of layer 0 is torch.float32 on cpu; this model carries torch.bfloat16",
    ),
    "state elsewhere": (
        lambda: MODEL(IDS, state=state_with(ssm_state=(torch.zeros(2, 24, 5).double().to("meta"),) * 3)),
        r"state.ssm_state of layer 0 is torch.float64 on meta; this model carries torch.float64 on cpu",
    ),
    "float position": (
        lambda: MODEL(IDS, state=state_with(position=torch.zeros(2))),
        r"state.position has type torch.float32; positions are integers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_input_that_cannot_run_is_refused(name: str) -> None:
    call, text = BAD[name]
    with pytest.raises(InputError, match=text) as caught:
        call()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MambascopeError)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@torch.no_grad()
def test_ids_of_every_integer_type_run(dtype: torch.dtype) -> None:
    assert torch.equal(MODEL(IDS.to(dtype)).logits, MODEL(IDS).logits)


def test_a_position_of_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match="position"):
        MODEL(IDS, state=state_with(position=torch.zeros(3, dtype=torch.long)))


def test_a_type_by_its_name_is_refused(tmp_path: Path) -> None:
    MODEL32.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype='float32' is no torch.dtype; pass one, such as torch.float32"):
        Mamba.from_pretrained(tmp_path, dtype="float32")  # type: ignore[arg-type]


def test_a_model_without_numbers_is_refused():
    with pytest.raises(InputError, match="the meta device, where tensors hold no numbers"):
        tiny().to("meta")(torch.tensor([[1, 2]]))
