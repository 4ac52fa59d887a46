"""Where the real rows lie that benchmarks measure on."""

import os
from pathlib import Path

ROWS_VARIABLE = "VARFLOW_TEST_DATA"  # tests read them there too


def find_rows(name: str = "") -> Path | None:
    """Return the folder of all real rows, or one in it, where the environment says where that is."""
    return Path(os.environ[ROWS_VARIABLE]) / name if os.environ.get(ROWS_VARIABLE) else None
