"""Out as stock diffusers: folders, LoRA and adapter files, the proof that they work, the card, the hub."""
