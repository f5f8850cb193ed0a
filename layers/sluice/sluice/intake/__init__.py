"""Submitting jobs, lists, batches and uploads, and reading those of one tenant."""
