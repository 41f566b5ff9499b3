"""Teachers by tracing, their conditions and latents."""
