"""What the wheel's own fakes return, without importing it: python -m tests.ascend.wheel_meta UNPACKED_WHEEL.

They are one file that asks torch_npu for error texts and versions. It runs here over modules that have nothing else, on the
schemas of kernels/vendored, in a process of its own: two sets of fakes do not fit into one.
"""

import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import npu_fakes
from tests.ascend import npu_calls


class AnyCode:
    def __getattr__(self, name: str) -> str:
        return name


def stand_ins() -> dict[str, dict[str, object]]:
    """The modules that the wheel's file imports, and what it takes from them."""
    text = lambda *args, **kwargs: ""
    return {
        "torch_npu": {},
        "torch_npu.utils": {},
        "torch_npu.utils._error_code": {"ErrCode": AnyCode(), "ops_error": text, "pta_error": text},
        "torch_npu.npu": {},
        "torch_npu.npu.utils": {"get_cann_version": lambda *args: "8.5.0"},
        "torch_npu.npu._backends": {"get_soc_version": lambda: 221},
    }


def install() -> None:
    for name, contents in stand_ins().items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module


def declare_all() -> Callable[[], None]:
    """Every op of the vendored schemas, as long as what is returned lives."""
    library = torch.library.Library("npu", "DEF")
    for line in npu_fakes.SCHEMAS.read_text().splitlines():
        if not line.startswith("#"):
            library.define(line.removeprefix("npu::"))
    return library


def main(wheel: str) -> None:
    library = declare_all()
    install()
    path = Path(wheel) / "torch_npu/op_plugin/meta/_meta_registrations.py"
    spec = importlib.util.spec_from_file_location("meta_registrations", path)
    module = importlib.util.module_from_spec(spec)
    warnings.simplefilter("ignore")
    spec.loader.exec_module(module)
    print(json.dumps({"ops": len(library._op_defs), "outlines": npu_calls.outlines("meta")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
