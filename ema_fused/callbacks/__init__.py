"""Averages inside training loops of other libraries, one module a library."""
