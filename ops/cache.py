"""Writes to a cache of keys or values, as an op, in place or not."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels import ascend, reference
from ops.define import define, folded, in_front


def _written(cache, positions, new):
    cache = cache.clone()
    reference.write_cache_(cache, positions, new)
    return cache


def _batched_in_place(info, in_dims, cache, positions, new):
    if in_dims[0] is None:
        raise ValueError("write_cache_ under vmap: a cache that all items share cannot hold what each of them writes")
    rows, positions, new = in_front(info, in_dims, cache, positions, new)
    flat = rows.flatten(0, 1)
    write_cache_inplace_op(flat, positions.flatten(0, 1), new.flatten(0, 1))
    if rows.stride(0) != rows.shape[1] * rows.stride(1):  # `flat` is a copy, not a view of the cache
        rows.copy_(flat.view(rows.shape))
    return None, None


write_cache_op = define(
    "write_cache(Tensor cache, Tensor positions, Tensor new) -> Tensor",
    fake=lambda cache, positions, new: cache.clone(),
    batched=lambda *a: folded(write_cache_op)(*a),
    default=_written,
    PrivateUse1=ascend.write_cache,
)
write_cache_inplace_op = define(
    "write_cache_(Tensor(a!) cache, Tensor positions, Tensor new) -> ()",
    fake=lambda cache, positions, new: None,
    batched=_batched_in_place,
    default=reference.write_cache_,
    PrivateUse1=ascend.write_cache_,
)


def write_cache(
    cache: Float[Tensor, "B S G K"], positions: Int[Tensor, "B T"], new: Float[Tensor, "B T G K"], *, donate: bool
) -> Float[Tensor, "B S G K"]:
    """The cache with new keys (or values) in each row's slots `positions`; with donate=True the given cache is overwritten."""
    if donate:
        write_cache_inplace_op(cache, positions, new)
        return cache
    return write_cache_op(cache, positions, new)
