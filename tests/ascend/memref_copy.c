/* What MLIR's lowering calls to copy one strided memref into another of the same sizes: Debian's copy of it loads all of LLVM. */
#include <stdint.h>
#include <string.h>

/* A descriptor: two pointers, an offset, then `rank` sizes and `rank` strides, counted in elements. */
typedef struct {
    char *allocated, *aligned;
    int64_t offset, numbers[];
} Memref;

typedef struct {
    int64_t rank;
    Memref *memref;
} Unranked;

static void copy(int64_t size, int64_t rank, const int64_t *sizes, const int64_t *from, const int64_t *to, char *source,
                 char *target) {
    if (rank == 0) {
        memcpy(target, source, size);
        return;
    }
    for (int64_t i = 0; i < sizes[0]; i++)
        copy(size, rank - 1, sizes + 1, from + 1, to + 1, source + i * from[0] * size, target + i * to[0] * size);
}

void memrefCopy(int64_t size, Unranked *source, Unranked *target) {
    const Memref *a = source->memref, *b = target->memref;
    const int64_t rank = source->rank;
    copy(size, rank, a->numbers, a->numbers + rank, b->numbers + rank, a->aligned + a->offset * size,
         b->aligned + b->offset * size);
}
