"""Where to write what was tried."""

import json
import os
from pathlib import Path

from tests.properties.documented import TALLY


def pytest_sessionfinish() -> None:
    """Write the tally where FEDRECSK_TALLY says."""
    path = os.environ.get("FEDRECSK_TALLY")
    if path:
        Path(path).write_text(json.dumps(TALLY))
