"""The inputs of a build: files and hub data sets, and the stage that reads them."""
