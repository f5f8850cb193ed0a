"""The outside world, one file per service. Foreign errors become ours here; nothing above sees boto3 or anthropic."""
