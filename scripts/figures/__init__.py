"""The figures of scripts/make_figures.py, one file per group."""
