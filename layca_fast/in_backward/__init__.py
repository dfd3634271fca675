"""Stepping inside of backward, one parameter at a time."""
