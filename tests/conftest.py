import pretended  # noqa: F401, I001  before torch

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # small models: more threads only wait for one another


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs CUDA, and is skipped only for lack of it")
    config.addinivalue_line("markers", "slow: more seeds, types and lengths of what is tested anyway; `make test-slow`")


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is there when a file's tests begin lives on: the collector, which `Trainer` calls often, goes past it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def threads() -> Iterator[None]:
    """torch's threads are afterwards as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[None, 7, 40], ids=["whole", "rows are cut", "a few rows"])
def cut(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of the compiled mixer of so few tokens."""
    from kernels_bridge.compiled import mixer

    if request.param is not None:
        monkeypatch.setattr(mixer, "FEWEST", request.param)
        monkeypatch.setattr(mixer, "CACHE", 1)
