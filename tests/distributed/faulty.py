"""`python -m entropy_kernels.measure` whose rank 1 fails in the middle of the sweep over η."""

from __future__ import annotations

import os
import sys

from entropy_kernels.errors import UserError
from entropy_kernels.measure import along
from entropy_kernels.measure.cli import main

MESSAGE = "model: this rank has lost its weights."

if os.environ.get("RANK") == "1":
    given = along.token_stats
    calls = []

    def token_stats(*args, **kwargs):
        """The third call fails."""
        calls.append(args)
        if len(calls) == 3:
            raise UserError(MESSAGE)
        return given(*args, **kwargs)

    along.token_stats = token_stats

if __name__ == "__main__":
    sys.exit(main())
