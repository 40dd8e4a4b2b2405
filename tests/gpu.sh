#!/bin/sh
# What a GPU shows in five minutes, or parts of it: tests/gpu.sh [--device=cpu] [PART …]. See tests/gpu.py.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" tests/gpu.py "$@"
