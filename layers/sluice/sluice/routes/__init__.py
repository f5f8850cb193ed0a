"""The routes of the API function, by subject: decode, one call, encode."""
