"""What the tests stand on: real processes, real servers."""
