"""Import torchvision where its wheel and torch do not match.

The wheel on the package index is a CUDA build. Beside a CPU torch its compiled half cannot load,
and the pure Python half then fails on the operators that it would have declared. Declaring them
(not defining: calling one is still an error) is all that datasets, transforms and models need.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def import_torchvision() -> ModuleType:
    """torchvision, imported once; with a matching build nothing but the import happens.

    Raises:
        ImportError: torchvision is not installed.
    """
    declare_missing_operators()
    return importlib.import_module("torchvision")


@functools.cache
def declare_missing_operators() -> Any:
    """Declare torchvision's operators if its compiled half cannot load.

    Returns:
        The library that holds the declarations, kept alive by the cache (they vanish with it),
        or None if there was nothing to do.
    """
    import torch

    ops: Any = torch.ops
    new_library: Any = torch.library.Library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("torchvision is not installed", name="torchvision")
    compiled = next(Path(spec.submodule_search_locations[0]).glob("_C*.*"), None)
    try:
        ops.load_library(str(compiled or "_C.so"))
        return None
    except OSError:
        library = new_library("torchvision", "FRAGMENT")
        for operator in _OPERATORS:
            library.define(operator + _SCHEMA)
        return library
