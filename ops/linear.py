import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

FEW, PARTS = 32, 8  # rows up to which a CPU is given the weight in so many parts


def linear(x: Float[Tensor, "*B D"], weight: Float[Tensor, "O D"]) -> Float[Tensor, "*B O"]:
    """x @ weight.T.

    With few rows, as in decoding, it is bound by reading the weight. A CPU's product of matrices then keeps one thread busy, at
    half of what it could read; as a batch of products, each of a part of the weight's rows, it reads as fast as memory goes:
    2.4x for one row, 3x for two, 1.4x for eight (LOG.md).
    """
    rows = math.prod(x.shape[:-1])
    # Only where the rows are known: a traced length would be pinned down by the question.
    if x.device.type != "cpu" or not (isinstance(rows, int) and 0 < rows <= FEW) or weight.shape[0] % PARTS:
        return F.linear(x, weight)
    parts, flat = weight.unflatten(0, (PARTS, -1)), x.reshape(rows, -1).expand(PARTS, -1, -1)
    # The vector on the right, where there are so few: a part's rows are then read one after the other.
    y = (parts @ flat.mT).permute(2, 0, 1) if rows < 4 else (flat @ parts.mT).transpose(0, 1)
    return y.reshape(*x.shape[:-1], -1).contiguous()
