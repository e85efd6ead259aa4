"""Each fault of the wheel that kernels.ascend_graph works around. A test here that fails says: the wheel is mended, take the work-around out."""

from contextlib import nullcontext

import pytest
import torch

from kernels import ascend_graph
from tests.ascend.test_rung4 import B, H, K, T, ge_of, npu, tensor

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
