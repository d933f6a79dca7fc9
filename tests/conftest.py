"""Set before anything is imported: without a GPU the kernels run in Triton's interpreter; nothing
asks the Hub; one OpenMP thread, for two on a busy machine of two cores can be 20 times slower.
And the tests' cases."""

import json
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent

def cases(name):
    """What tests/cases/NAME.json holds, by the names before a colon."""
    found = json.loads((ROOT / f"tests/cases/{name}.json").read_text())
    return {name.partition(":")[0]: values for name, values in found.items()}

SHAPES = cases("shapes")
