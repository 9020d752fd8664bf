"""L7: the command line. Parse, call, print: every decision that is not about arguments or looks lives in a lower room.

One module a command, imported when that command is used. What a command needs from the rooms below it imports inside
its function, so that help and mistakes in arguments answer at once.
"""
