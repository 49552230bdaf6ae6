"""Other libraries' progress bars and notices kept off the screen, where they would bury the run's own lines and its errors."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Leaves errors only; that a value head starts anew, for one, is none. TRANSFORMERS_VERBOSITY brings back what transformers says."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it says what a CPU lacks
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
