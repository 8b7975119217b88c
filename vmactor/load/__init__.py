"""Load on a manager: scenarios, their runs, and what they came to (docs/load.md)."""
