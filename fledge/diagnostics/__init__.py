"""L6: the checks of `fledge doctor`. Printing is in fledge.cli."""
