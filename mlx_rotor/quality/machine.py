"""The facts that a measurement is stored with: machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version

import mlx.core as mx

from .. import __version__


def machine() -> dict[str, str]:
    info = mx.device_info()
    return {
        "machine": f"{info.get('device_name', platform.machine())}, {os.cpu_count()} cores, {platform.system()}",
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlx_rotor": __version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
