"""Data a method may need besides conditioning: images, and the noise that makes a run repeatable."""
