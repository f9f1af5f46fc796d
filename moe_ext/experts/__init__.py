"""Experts: the networks that routed tokens go through."""
