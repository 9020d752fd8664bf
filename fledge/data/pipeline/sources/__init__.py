"""The inputs of a build: files and hub data sets, and how they are read."""
