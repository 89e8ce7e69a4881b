"""The tests import the files at the top level by name; figures and runs go to temporary folders."""

import os
import sys
from pathlib import Path

# A virtual machine can claim AMX, the CPU's bf16 unit, and end whoever uses it (seen: SIGILL).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)      # tiny tensors: on a busy machine two threads wait for each other


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")
