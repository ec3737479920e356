from __future__ import annotations

import pytest
import torch
from helpers import plane_model


@pytest.fixture
def model(seed):
    """Two layers sharing one BitsState, at 4 bits."""
    return plane_model(seed)


@pytest.fixture
def x(seed):
    """Activations [2, 3, 70]: batch, sequence, features; float64, so that only a wrong weight differs."""
    return torch.randn(2, 3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
