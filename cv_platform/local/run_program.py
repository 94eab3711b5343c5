"""What supervisord runs for each program: ends the leftovers of its predecessor, then becomes the program itself.

`python -m cv_platform.local.run_program HOME NAME end|keep COMMAND…`; `keep` lets them finish: Dagster's runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cv_platform.local.leftovers import end_leftovers, marked, program_mark


def main() -> None:
    """Replaces this process by the program, so that supervisord's signals reach it."""
    home, name, leftovers, *command = sys.argv[1:]
    mark = program_mark(Path(home), name)
    if leftovers == "end":
        end_leftovers(mark)
    os.execvpe(command[0], command, marked(os.environ, mark))


if __name__ == "__main__":
    main()
