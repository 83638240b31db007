"""Small helpers behind the 2D-parallel (tensor x data) training notebooks."""
