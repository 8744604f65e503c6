"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise a ModuleNotFoundError that names the extra which brings it.

    >>> require("math", "train").pi > 3
    True
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there and misses something of its own: that message is the useful one
        raise ModuleNotFoundError(
            f'{module} is missing: pip install "subspan[{extra}]"', name=error.name, path=error.path
        ) from None
