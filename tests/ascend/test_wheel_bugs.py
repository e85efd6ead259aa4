"""Each fault of the wheel that kernels.ascend_graph works around. A test here that fails says: the wheel is mended, take the work-around out."""

import inspect

from kernels import ascend_graph


def test_gradient_of_attention_converts_to_one_output_too_few():
    """The schema has five, the last the gradient of `sink`; the converter still returns GE's first four."""
    op = ascend_graph.FUSION_ATTENTION_GRAD
    known = inspect.signature(ascend_graph.get_or_auto_gen_converter(op)).parameters
    assert len(op._schema.returns) == 5
    assert [a.name for a in op._schema.arguments if a.name not in known] == ["softmax_layout", "sink"]
