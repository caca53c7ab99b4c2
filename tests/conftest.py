"""What every test needs: one thread, since the models are tiny and several test processes share the cores."""

import os

import pytest
import torch
import torch._dynamo

os.environ.setdefault("KVPASS_CXXFLAGS", "-O0")  # hundreds of kernels that run for microseconds
os.environ.setdefault("KVPASS_TIERS", "eager")  # tests that are about steps say so
torch.set_num_threads(1)
torch._dynamo.config.fake_tensor_cache_enabled = False  # models of two layers hardly hit it, and pay a fifth of a test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden text of generated kernels anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real models first: they take minutes, and the processes share out the small tests that are left."""
    items.sort(key=lambda item: item.get_closest_marker("weights") is None)
