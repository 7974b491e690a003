"""Puts the demo's scripts on the import path of the tests."""

import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent
if str(DEMO) not in sys.path:
    sys.path.insert(0, str(DEMO))
