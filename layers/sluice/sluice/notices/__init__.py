"""Telling of ends: events on the default bus, and webhooks."""
