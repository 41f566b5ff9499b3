"""A page on which teacher and student draw side by side."""
