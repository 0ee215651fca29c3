"""A Python function named on the command line, as `FILE.py:FUNCTION`."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from trueward.data.sources import DataError


def is_python_function(name: str) -> bool:
    """Tell whether a name has the form `FILE.py:FUNCTION`."""
    path, _, function = name.rpartition(":")
    return path.endswith(".py") and bool(function)


def python_function(name: str, *, what: str = "function") -> Callable[..., object]:
    """Return the function that `FILE.py:FUNCTION` names; the file is run.

    Args:
        name: The path as given, relative to the working directory, and the function in it.
        what: Stands in the error for what the function is: "reward function", say.

    Raises:
        DataError: The file does not exist, or there is no such function in it.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise DataError(f"The {what}'s file {path} does not exist: check the path.")
    # One name for each file, so that two files can be loaded at once.
    module_name = f"trueward_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses in the file look their module up
    spec.loader.exec_module(module)
    found: Callable[..., object] | None = getattr(module, function, None)
    if not callable(found):
        raise DataError(f"{path} has no function '{function}'.")
    return found
