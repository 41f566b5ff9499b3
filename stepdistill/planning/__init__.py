"""What a run will need and whether it can work, before a weight is loaded: memory, time, the audit."""
