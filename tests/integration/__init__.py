"""Tests against real servers and real processes, one part at a time."""
