"""The outside world, one file per service. Errors are translated here; nothing above sees boto3 or anthropic."""
