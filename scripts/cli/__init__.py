"""The command line: `sluice`. A client of the HTTP API; `setup`, `keys` and `dead-letters` call AWS instead."""
