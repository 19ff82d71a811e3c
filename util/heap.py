"""Freed memory of a CPU run is kept for the next tensor (glibc's malloc): training and sampling ask for it."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # numbers of malloc.h


def keep_freed_memory(keep: bool = True) -> bool:
    """Whether blocks of many MiB stay with the process once freed; returns False, and changes nothing, where malloc is
    not glibc's.

    glibc gives them back to the kernel, which clears every page anew when it is next touched: a 65 MB tensor costs ten
    times its own arithmetic then. A training step frees and takes the same sizes over and over. The price is memory
    that nobody uses at the moment, 0.1 of 4.2 GiB in training base. keep=False: what glibc arrives at by itself.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if keep:
        return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    done = (
        libc.mallopt(M_MMAP_MAX, 65536)
        and libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        and libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
    )
    libc.malloc_trim(0)
    return bool(done)
