"""Data files: prices with effective dates, and which models share one limit group."""
