"""The figures of scripts/make_figures.py, a file for each group."""
