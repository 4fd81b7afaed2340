"""All fifteen tasks of MTL15, single and merged: `eval/interpolation/run.py` with a plan of its own.

    python eval/mtl15/run.py [--tasks yahoo] [--methods copra] [--workers 2]

Uses every GPU, or every core; stopped and started again, it goes on where it was.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.argv[1:1] = ["--plan", str(HERE / "plan.yaml")]
    runpy.run_path(str(HERE.parent / "interpolation" / "run.py"), run_name="__main__")
