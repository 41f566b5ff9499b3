"""Everything that knows diffusers pipelines: tracing, conditioning, generation, export."""
