"""From an exported program to the graph that Ascend's graph engine (GE) compiles; the only file that imports torch_npu.

The conversion is that of torchair, in the torch_npu wheel that tests/ascend/overlay.py pins, with its bugs worked around. Each bug
has a test in tests/ascend/test_wheel_bugs.py that fails once the wheel is fixed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_npu  # noqa: F401  (it puts the torchair that it carries where the imports below find it)
from torch.export import ExportedProgram
from torchair._ge_concrete_graph import ge_apis as ge
from torchair._ge_concrete_graph.fx2ge_converter import get_or_auto_gen_converter, register_fx_node_ge_converter
from torchair._ge_concrete_graph.ge_ir_pb2 import GraphDef
from torchair.configs.compiler_config import CompilerConfig
from torchair.ge import ge_graph_ascend
from torchair.npu_fx_compiler import get_compiler

FUSION_ATTENTION_GRAD = torch.ops.npu.npu_fusion_attention_grad.default


def to_ge(program: ExportedProgram) -> GraphDef:
    """The GE graph of a program whose tensors are on device npu.

    Raises ValueError, which names every op that has no converter: torchair alone leaves a node of that name in the graph, which fails
    only when an NPU runs it. For ops whose converter only raises, torchair's own error names the first.
    """
    with overridden():
        graph = ge_graph_ascend._optimize_and_convert(program).proto
    if names := unconverted(graph):
        raise ValueError(f"no GE converter for {', '.join(names)}: expected ops of kernels/vendored/ge_converters.txt")
    return graph


def compiled(program: ExportedProgram, config: CompilerConfig | None = None) -> Callable[..., Any]:
    """A function of the program's inputs, in order, that runs on the graph engine; CANN compiles it at the first call."""
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with overridden():
        return get_compiler(config)(program.graph_module, inputs)


def op_counts(graph: GraphDef) -> Counter[str]:
    """How many ops of each GE type the graph has."""
    return Counter(op.type for op in graph.op)


def unconverted(graph: GraphDef) -> list[str]:
    """The types in the graph that are names of PyTorch's ops: those contain a dot, GE's own do not."""
    return sorted({op.type for op in graph.op if "." in op.type})


@contextmanager
def overridden() -> Iterator[None]:
    """Within the block, the converters defined here replace the wheel's."""
    wheels = get_or_auto_gen_converter(FUSION_ATTENTION_GRAD)

    def fusion_attention_grad(
        *args: Any, sink: None = None, softmax_layout: str = "", meta_outputs: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """The wheel's converter, which lacks the two newest arguments and the fifth output, the gradient of `sink`."""
        if sink is not None or softmax_layout:
            raise NotImplementedError("npu_fusion_attention_grad with sink or softmax_layout has no GE converter")
        return *wheels(*args, **kwargs), ge.Const(0.0)

    register_fx_node_ge_converter(FUSION_ATTENTION_GRAD)(fusion_attention_grad)
    try:
        yield
    finally:
        register_fx_node_ge_converter(FUSION_ATTENTION_GRAD)(wheels)
