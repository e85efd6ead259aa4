"""Failed memory allocation, on the host or on a device: recognised in the errors of many libraries, and reported in one line."""

import errno
import re

# Texts in RuntimeErrors (torch and its compilers, torch_npu and CANN, XLA) and of libraries that do not load.
TEXTS = re.compile(
    r"out of memory"  # CUDA's, the NPU's and XLA's allocators, and a compiler's
    r"|can't allocate memory|not enough memory"  # torch's on a CPU: Linux, Windows
    r"|cannot allocate memory(?! in static TLS)|failed to map segment from shared object"  # the system's: mmap, fork, a library's loader
    r"|std::bad_alloc"
    r"|failed to allocate memory|\b207001\b"  # CANN's: EL0004, ACL_ERROR_RT_MEMORY_ALLOCATION
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|could not create a (primitive|memory object)",  # all that oneDNN reports
    re.IGNORECASE,
)
THREAD = "can't start new thread"
# "you tried to allocate 4096 bytes", "Tried to allocate 2.00 GiB", numpy's "Unable to allocate 7.45 GiB for an array".
ASKED = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]?i?B)\b", re.IGNORECASE)
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


class OutOfMemory(MemoryError):
    """Memory allocation failed. The message is one line: what was tried, what it takes and what reduces it."""


def told(error: BaseException) -> str | None:
    """The failed allocation in words, such as "2.0 GB more were asked for" ("" if unknown); None for an error of another kind.

    The error's causes and contexts are searched too, since libraries convert such errors.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if (words := _told(link)) is not None:
            return words
        link = link.__cause__ or link.__context__
    return None


def line(error: BaseException) -> str | None:
    """The line for an error of failed allocation; None for an error of another kind."""
    if isinstance(error, OutOfMemory):
        return str(error)
    if (words := told(error)) is None:
        return None
    return f"out of memory{words and f' ({words})'}: ask for less at once, or give this process more (ulimit -v)"


def size(n: float) -> str:
    """A number of bytes in MB or GB, for a message."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _told(error: BaseException) -> str | None:
    # torch.OutOfMemoryError by its name: this module is imported before torch, which takes seconds.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    text = str(error) if isinstance(error, MemoryError | RuntimeError | ImportError | OSError) else ""
    if isinstance(error, RuntimeError) and THREAD in text:
        return "no memory, or no process (ulimit -u), was left for a thread"
    if not known and TEXTS.search(text) is None:
        return None
    if (found := ASKED.search(text)) is None:
        return ""
    number, unit = found.groups()
    bytes_ = float(number) * (1024 if "i" in unit else 1000) ** UNITS.get(unit[0].upper(), 0)
    return f"{size(bytes_)} more were asked for"
