"""Batches as a whole: planning files into ranges, and assembling their results."""
