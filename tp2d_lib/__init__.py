"""Small helpers behind the 2D-parallel (tensor x data) training notebooks."""

import os

# After `uv run`, Ray would start every worker by `uv run` in a copy of the folder. Ours
# have the driver's interpreter, or what connect(pip=...) installs. Ray reads it once,
# when it is imported.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
