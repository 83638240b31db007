"""Errors whose sentence is all that a user needs."""


class UserError(Exception):
    """Shown in a notebook as one sentence, as on the command line: no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]
