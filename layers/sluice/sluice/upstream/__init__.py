"""The batch lane: rows of batches become Message Batches upstream, and the ranges get their results."""
