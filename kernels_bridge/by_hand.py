"""Backwards that are written by hand have no gradient of their own, and say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from minimal_mamba.errors import BackendUnavailable

T = TypeVar("T")


def refuse_second() -> None:
    """In a backward: raise BackendUnavailable if it is asked for gradients that can be differentiated again."""
    if torch.is_grad_enabled():
        raise BackendUnavailable(
            "a gradient that can be differentiated again was asked for (create_graph=True: a Hessian, a gradient "
            "penalty, torch.autograd.functional.jvp); the backward of this backend is written by hand and gives "
            "first gradients only. Run with backend='reference'."
        )


def by_hand(backward: Callable[..., T]) -> Callable[..., T]:
    """Of an autograd function's `backward`: refuse what it cannot give.

    torch's `once_differentiable` hangs its refusal on a node that leads nowhere: `torch.autograd.grad`, and with it
    `hessian` and `jvp`, go past it and take what is missing for zero.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> T:
        refuse_second()
        return backward(ctx, *grads)

    return checked
