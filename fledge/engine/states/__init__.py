"""States as files, stores of states, and documents that are read once."""
