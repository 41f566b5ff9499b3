"""Guidance rules for sampling, beside classifier-free guidance."""
