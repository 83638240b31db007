"""Everything that starts, places, watches, restarts and measures a run."""
