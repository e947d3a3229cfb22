"""The error for a module whose framework isn't installed."""

from __future__ import annotations


def missing(framework: str, extra: str, error: ImportError) -> ImportError:
    """The error to raise where ``framework`` can't be imported because of ``error``."""
    return ImportError(
        f"{framework} can't be imported ({error}), and this module is a part of it; "
        f"pip install 'ema_fused[{extra}]', or import the module of the framework that you use"
    )
