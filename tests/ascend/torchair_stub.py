"""A stand-in for torchair's native modules, which need CANN's graph engine: conversion to a GE graph itself is plain Python."""

import sys
from types import ModuleType
from typing import Any

# What torchair asks for while it is imported and while it converts, and nothing that would run a graph.
CONTENTS: dict[str, Any] = {
    "TorchNpuGraphBase": type("TorchNpuGraphBase", (), {"__init__": lambda self, name: None}),
    "TorchDataType": type("TorchDataType", (), {"__getattr__": lambda self, name: name})(),
    "InitializeGraphEngine": lambda options: None,
    "FinalizeGraphEngine": lambda: None,
    "InitDeviceStdoutChannel": lambda device: None,
    "GetSocName": lambda: "Ascend910B2",
    "check_cann_compat": lambda *args: "",  # nothing is said against an op
    "get_registered_ir_def": lambda name: ("unregistered", [], [], []),  # no converter is made up for an op
}


def install() -> None:
    """Before torchair is imported. It knows itself by two names, and so must its parts be known."""
    for part in ("_torchair", "_npu_graph_executor", "_npu_utils"):
        module = ModuleType(f"torchair.core.{part}")
        vars(module).update(CONTENTS if part == "_torchair" else {})
        for package in ("torchair.core", "torch_npu.dynamo.torchair.core"):
            sys.modules[f"{package}.{part}"] = module
