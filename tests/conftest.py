"""The tests import the files at the top level by name; figures and runs go to temporary folders."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)      # tiny tensors: on a busy machine two threads wait for each other


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")
