"""L0: what every room may use and that knows nothing about models.

`errors` is the one exception tree, `config` turns dataclasses into dicts and back strictly, `files` writes atomically
and hashes, `device` chooses a device and a dtype and says why.
"""
