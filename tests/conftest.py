"""Puts the repository's root on the path, so that tests import the flat files by name."""
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"     # tests run side by side, a core each; tiny nets gain little from a second


# fixtures: the walk through all meshes, and runs that many tests look at
SLOW = {"ran", "distilled", "events", "runs", "trained"}


def pytest_collection_modifyitems(items):
    """A test is slow if it needs a slow fixture, for whichever comes first waits for it."""
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also where the shell that began the tests has it ignored, as it does for `… &`."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)
