"""Schedules and predictions, the denoiser of any pipeline, guidance, samplers, closed-form teachers."""
