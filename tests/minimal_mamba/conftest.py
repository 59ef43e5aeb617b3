from pathlib import Path

import pytest
from helpers import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path
