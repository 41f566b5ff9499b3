"""What several methods share: losses, time distributions, adversarial terms, TrigFlow, f-divergences."""
