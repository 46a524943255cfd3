import os
from pathlib import Path

import pytest

from f2pad_jax import load_backbone


@pytest.fixture(scope="session")
def shared():
    """The folder of evaluation data beside the project."""
    folder = Path(os.environ.get("F2PAD_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("needs the evaluation data: set F2PAD_SHARED to the folder that holds data/ and weights/")
    return folder


@pytest.fixture(scope="session")
def backbone():
    return load_backbone("efficientnet-lite0")
