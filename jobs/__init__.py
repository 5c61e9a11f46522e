"""Ray Data, Ray Train and Ray Core live here: one file a job, with its configuration, its worker and `main(config)`.

`python jobs/distill.py` puts this directory first on `sys.path`, where a job called `evaluate` or `corpus` would shadow
the library of that name. Every job imports this package before any library, and that takes the directory off the path
again; Ray's workers copy the driver's path, so it holds for them too.

Ray reads its authentication mode when it is imported: a job that will start a cluster of its own sets it here.
"""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
if str(_HERE.parent) not in sys.path:
    sys.path.insert(0, str(_HERE.parent))
if "RAY_ADDRESS" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
