"""The GPU, as TorchServe's frontend and the model's worker are told of it.

Where GKE mounts the NVIDIA driver, no path leads to it by itself: the frontend counts GPUs with
`nvidia-smi`, the worker loads `libcuda.so`.

TorchServe 0.12's frontend takes CUDA_VISIBLE_DEVICES for a list of integers and exits at anything
else, such as the UUID of a GPU or of a part of one (MIG). All that it does with the list is to
count and to tell the worker a position in it, which means the same to CUDA in a list of UUIDs. So
the frontend gets positions, and the worker what was given: handler/seq2seq_handler.py puts it in
place before CUDA is asked for anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DRIVER = Path("/usr/local/nvidia")
VISIBLE = "CUDA_VISIBLE_DEVICES"
WORKER_VISIBLE = "SEQ2SERVE_CUDA_VISIBLE_DEVICES"


def device_environment(inherited: Mapping[str, str], driver: Path = DRIVER) -> dict[str, str]:
    """Return `inherited` as the frontend can bear it, and the worker, which inherits it, needs it.

    Args:
        driver: folder of the driver's `bin` and `lib64`; what does not exist is left out.
    """
    environment = {key: value for key, value in inherited.items() if key != WORKER_VISIBLE}
    for variable, folder in (("PATH", "bin"), ("LD_LIBRARY_PATH", "lib64")):
        path = str(driver / folder)
        known = [one for one in environment.get(variable, "").split(":") if one]
        # Last: whatever the image brings itself goes first.
        if (driver / folder).is_dir() and path not in known:
            environment[variable] = ":".join([*known, path])
    visible = environment.get(VISIBLE, "")
    devices = visible.split(",")
    if visible and not all(re.fullmatch(r"-?\d+", one) for one in devices):
        environment[WORKER_VISIBLE] = visible
        environment[VISIBLE] = ",".join(str(i) for i in range(len(devices)))
    return environment
