"""Comparing methods at equal budget: the grid of runs, what runs them, and what their results say."""
