"""Threads of matrix products."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Keeps products of matrices in the calling thread, as a block or as a decorator: for many that are small.

    OpenBLAS's other threads wait for the next product by spinning: thousands of small ones then take several times the
    CPU time, and on a busy machine they take longer by the clock as well. The limit holds for the whole process.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
