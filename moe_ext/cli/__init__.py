"""Command-line tools: demo, doctor and the launcher that they share."""
