"""What comes in: jobs, lists, batches and uploads, and each tenant's view of its own."""
