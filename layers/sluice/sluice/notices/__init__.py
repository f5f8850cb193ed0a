"""Notifications of completion: events on the default bus, webhooks, metrics and logs."""
