"""L0: helpers that every other package may use; they know nothing about models.

errors               the exception tree
config               TOML and JSON tables as dataclasses, with strict keys and types
files                atomic writes, hashes and standard folders
safetensors_header   the header of a safetensors file, parsed and encoded
device               the choice of a device and a dtype, with reasons
interrupts           SIGINT and SIGTERM, handled between steps
"""
