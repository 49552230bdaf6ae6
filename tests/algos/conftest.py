"""Hypothesis without a deadline: the first torch call of a process may take long, and that is no property of the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
