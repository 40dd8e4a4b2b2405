"""Puts the repository's root on the path, so that tests import the flat files by name."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"     # tests run side by side, a core each; tiny nets gain little from a second
