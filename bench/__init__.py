"""Measurements. Each prints a markdown table with its peer's figures from the same run, and the
command and machine they belong to; docs/results.md keeps those that count."""
