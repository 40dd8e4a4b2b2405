"""Puts the repository's root on the path, so that tests import the flat files by name."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")  # the suite is written for two cores
