"""L7: the command line: parse arguments, call the packages below, print the results. It contains no other logic.

Each command has one module, which is imported when that command runs. A command imports heavy packages inside its
function, so that help and usage errors are printed immediately.
"""
