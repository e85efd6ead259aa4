"""3 x 3 convolutions with 4 / 9 of the products: Winograd's F(2 x 2, 3 x 3), of tensor ops alone.

A tile of 4 x 4 inputs makes 2 x 2 outputs. Transformed, tile and filter are multiplied at 16 points, where the sum itself takes
4 x 9 products (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). The transforms only add, subtract and
halve, so that errors are those of any other order of summing (LOG.md). Channels come last in memory: every sum is over lines.

Axes: B batch, C inputs, O outputs, H W the picture's sides; of a strip, r rows of tiles with w in each
"""

import torch
from torch import Tensor

FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))  # 3 of a filter's numbers to 4
STRIP = 1 << 22  # numbers of a strip's transformed tiles: 16 MB, about what stays in a CPU's last cache


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B C H W], H and W even, zeros around it, by weight [O C 3 3], plus bias [O]: [B O H W], channels last in memory."""
    (B, C, H, W), O = x.shape, len(weight)
    w, x, points = W // 2, x.permute(0, 2, 3, 1), _points_of(weight)
    out = x.new_empty(B, H, W, O)
    rows = max(1, min(H // 2, STRIP // (16 * w * C)))
    # Written over by every strip: fresh memory would cost more than what is computed in it.
    framed = x.new_zeros(2 * rows + 2, W + 2, C)
    lines, tiles = x.new_empty(4 * rows * (W + 2) * C), x.new_empty(16 * rows * w * C)
    products, sums = x.new_empty(16 * rows * w * O), x.new_empty(8 * rows * w * O)
    for picture, result in zip(x, out, strict=True):
        for top in range(0, H, 2 * rows):
            r = min(rows, (H - top) // 2)
            frame = framed[: 2 * r + 2]
            first, last = max(top - 1, 0), min(top + 2 * r + 1, H)
            frame[: first - top + 1] = 0
            frame[last - top + 1 :] = 0
            frame[first - top + 1 : last - top + 1, 1:-1] = picture[first:last]
            across = lines[: 4 * r * (W + 2) * C].view(4, r, W + 2, C)
            down = tiles[: 16 * r * w * C].view(4, 4, r, w, C)
            _to_points([frame[k : k + 2 * r : 2] for k in range(4)], across)
            _to_points([across[:, :, k : k + W : 2] for k in range(4)], down.transpose(0, 1))
            at_points = products[: 16 * r * w * O].view(4, 4, r, w, O)
            torch.bmm(down.view(16, r * w, C), points, out=at_points.view(16, r * w, O))
            half = sums[: 8 * r * w * O].view(2, 4, r, w, O)
            _from_points(at_points, half)
            pixels = result[top : top + 2 * r].view(r, 2, w, 2, O).permute(3, 1, 0, 2, 4)
            _from_points(half.transpose(0, 1), pixels)
            pixels += bias
    return out.permute(0, 3, 1, 2)


def _points_of(weight: Tensor) -> Tensor:
    """[16 C O]: every filter at the 16 points."""
    one = torch.tensor(FILTER, dtype=weight.dtype)
    return (torch.kron(one, one) @ weight.flatten(0, 1).flatten(1).mT).view(16, *weight.shape[:2]).mT


def _to_points(d: list[Tensor], out: Tensor) -> None:
    """Four neighbours to four points."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _from_points(m: Tensor, out: Tensor) -> None:
    """Four points to the two outputs between them."""
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
