"""Other libraries' progress bars and notices kept off the screen, where they would bury the run's own lines and its errors."""

from __future__ import annotations

import logging
import os


def quiet_bitsandbytes() -> None:
    """Leaves errors only: while it is imported it says what a CPU lacks ("Failed to load CPU gemm_4bit_forward …"), which nothing needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Leaves errors only; that a value head starts anew, for one, is none. TRANSFORMERS_VERBOSITY brings back what transformers says."""
    quiet_bitsandbytes()
    import torch

    if not torch.cuda.is_available():  # peft imports accelerate, which imports deepspeed, which says that it looked for a GPU in vain
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
