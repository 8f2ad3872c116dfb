"""Where and when a measurement was made, for the line above its table."""

import datetime
import platform

import torch

from handler.seq2seq_handler import usable_cpus


def described() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{datetime.date.today()}, {usable_cpus()} cores of {name}, {gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
