"""RLHF whose result does not depend on how the work was cut up."""

__version__ = "0.1.0"
