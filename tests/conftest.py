"""What a script's `main` changes in its process is undone after every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def process_settings():
    """Denormal numbers are back on after a test: hypothesis draws none from a processor that flushes them."""
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)
