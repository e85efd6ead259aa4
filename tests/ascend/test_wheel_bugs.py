"""Each fault of the wheel that kernels.ascend_graph and lumina_fn.programs.graphs work around. A test here that fails says: the wheel is mended, take the work-around out."""

import re
from contextlib import nullcontext

import pytest
import torch

from kernels import ascend_graph
from lumina_fn.errors import InputError
from lumina_fn.optim import AdamW
from lumina_fn.programs import graphs
from tests.ascend.test_rung4 import CFG, B, H, K, T, ge_of, npu, tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # see test_rung4


def attention_grad(q, k, v, dy, mask, largest, total, out):
    return npu.npu_fusion_attention_grad(
        q, k, v, dy, H, "BSH", atten_mask=mask, softmax_max=largest, softmax_sum=total, attention_in=out, sparse_mode=3
    )[:3]


def test_gradient_of_attention_converts_to_one_output_too_few(monkeypatch):
    """The schema has five, the last the gradient of `sink`; the wheel's converter still returns GE's first four."""
    flat = lambda: tensor(B, T, H * K)
    stat = lambda: tensor(B, H, T, 8, dtype=torch.float32)
    args = flat(), flat(), flat(), flat(), tensor(2048, 2048, dtype=torch.bool), stat(), stat(), flat()
    assert ascend_graph.op_counts(ge_of(attention_grad, *args)[1])["FlashAttentionScoreGrad"] == 1
    monkeypatch.setattr(ascend_graph, "overridden", nullcontext)
    with pytest.raises(AssertionError, match="length of ge_outputs must be equal to meta_outputs"):
        ge_of(attention_grad, *args)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("op", graphs.COMPOSITES, ids=str)
def test_a_composite_that_stays_whole_has_no_converter(op):
    """torch takes these apart, but where torch_npu is loaded, which has kernels for them; a step has all of them."""
    assert str(op) not in graphs.converters()
    kernels = {key: kernel for key, kernel in graphs.NPU.kernels.items() if key is not op}
    function = graphs.step(CFG, AdamW(), batch=1, tokens=8, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=rf"it cannot run {re.escape(str(op))} \("):
        graphs.export(function, graphs.NPU._replace(kernels=kernels))
