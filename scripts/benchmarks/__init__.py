"""The comparisons of scripts/bench.py, a file for each subject."""
