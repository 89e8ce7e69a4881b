"""The tests import the files at the top level by name; figures and runs go to temporary folders."""

import os
import sys
from pathlib import Path

# A virtual machine can claim AMX, the CPU's bf16 unit, and end whoever uses it (seen: SIGILL).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)      # tiny tensors: on a busy machine two threads wait for each other


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs go to an empty folder that also holds images.npz: 40 images, 8x8 RGB, 2 classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("images.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
             labels=np.arange(40) % 2)
    return tmp_path
