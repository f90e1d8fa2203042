"""Placement as an assignment problem: repeated nodes share variables (classes), one integer program an axis (assignment)."""
