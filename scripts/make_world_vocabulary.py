"""Make fledge/assets/world-vocabulary.xz from the vocabulary file inside the PyPI package `rwkv` (Apache-2.0).

    python scripts/make_world_vocabulary.py [rwkv_vocab_v20230424.txt] [--check]

Without a path the file of the installed `rwkv` package is used. `--check` writes nothing and fails where the packaged
file holds anything else. Run it only when the packaged form changes; the result is part of the repository.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import lzma
import sys
from pathlib import Path

from fledge.core.files import atomic_path, get_asset_path
from fledge.tokenizer import vocabulary_file

SOURCE_NAME = "rwkv_vocab_v20230424.txt"
SOURCE_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


def installed_source() -> Path:
    """The vocabulary file of the installed `rwkv` package, found without importing it (its import builds things)."""
    spec = importlib.util.find_spec("rwkv")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package `rwkv` is not installed: pip install rwkv, or give the path of " + SOURCE_NAME)
    return Path(next(iter(spec.submodule_search_locations))) / SOURCE_NAME


def parse(text: str) -> list[bytes]:
    """Token bytes in id order. A line is: id, space, Python literal (which may hold spaces), space, length in bytes."""
    tokens: list[bytes] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        head, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal)
        token = value.encode() if isinstance(value, str) else value
        if int(head) != number or len(token) != int(length):
            sys.exit(f"line {number}: id {head} or length {length} does not fit {literal}")
        tokens.append(token)
    return tokens


def main() -> None:
    """Read, check, write (or compare)."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path, nargs="?", help=f"path of {SOURCE_NAME}")
    arguments.add_argument("--check", action="store_true", help="write nothing; fail where the packaged file differs")
    options = arguments.parse_args()
    source = options.source or installed_source()

    # The copy in the wheel has CRLF line ends, the canonical file LF.
    content = source.read_bytes().replace(b"\r\n", b"\n")
    digest = hashlib.sha256(content).hexdigest()
    if digest != SOURCE_SHA256:
        sys.exit(f"{source}: SHA-256 with LF line ends is {digest}, expected {SOURCE_SHA256}")
    payload = vocabulary_file.pack(parse(content.decode("utf-8")))
    payload_digest = hashlib.sha256(payload).hexdigest()
    target = get_asset_path(vocabulary_file.FILE_NAME)
    if options.check:
        if not target.exists() or lzma.decompress(target.read_bytes()) != payload:
            sys.exit(f"{target} does not hold the vocabulary of {source}")
        print(f"{target} holds the vocabulary of {source}")
        return
    with atomic_path(target) as temporary:
        temporary.write_bytes(vocabulary_file.compress(payload))
    print(f"{target}: {target.stat().st_size} bytes, payload {len(payload)} bytes, SHA-256 {payload_digest}")


if __name__ == "__main__":
    main()
