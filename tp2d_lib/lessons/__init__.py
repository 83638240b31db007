"""What only the notebooks need."""
