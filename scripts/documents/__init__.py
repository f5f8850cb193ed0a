"""Documents that are generated from the code: `python -m scripts.documents` writes them, `--check` compares them.

- docs/openapi.json from `functions/api/app.py`
- docs/cli.md from the command line
- docs/settings.md, between its markers, from template.yaml
- docs/state_machine.md, between its markers, from the table of transitions
"""
