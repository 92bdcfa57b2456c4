"""One line at the top of a script: ``import gemma_accel.auto``.

From then on a Gemma 4 checkpoint loads into its accelerated form (the per-layer table never on the
GPU), and the model is applied when a Trainer is built around it. This module and `gemma_accel.run`
are the only two whose import acts. ``GEMMA_ACCEL_DISABLE=1`` turns it off.
"""

from __future__ import annotations

import os
import warnings

__all__: list[str] = []


def _enable() -> None:
    if os.environ.get("GEMMA_ACCEL_DISABLE", "0") not in ("", "0"):
        warnings.warn(
            "GEMMA_ACCEL_DISABLE is set: gemma_accel does nothing, loading included. E2B and E4B "
            "in 4 bits need 6.4 and 8.8 GiB of GPU "
            "memory to load then; 8 GB will not do.",
            UserWarning,
            stacklevel=3,
        )
        return
    from gemma_accel.allocator import expand_segments
    from gemma_accel.loading import install_load_path
    from gemma_accel.wiring import apply_automatically

    expand_segments()  # before the weights come: what was allocated earlier stays as it is
    install_load_path()
    apply_automatically()


_enable()
