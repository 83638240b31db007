"""The comparisons of scripts/bench.py, one file per subject."""
