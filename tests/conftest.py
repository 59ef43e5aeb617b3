import pytest
import torch

torch.set_num_threads(1)  # small models: more threads only wait for one another


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs CUDA, and is skipped only for lack of it")
