"""Monitoring: statistics, sinks, plots, profiling and explain."""
