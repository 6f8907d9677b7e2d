"""Prints, as JSON, the machine code's properties of every case in this directory: `python tests/ops/compiled`."""

import importlib
import json
from pathlib import Path

STEMS = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - {"__main__", "case"})

if __name__ == "__main__":
    cases = [case for stem in STEMS for case in importlib.import_module(stem).CASES]
    print(json.dumps({case.name: case.machine_code() for case in cases}))
