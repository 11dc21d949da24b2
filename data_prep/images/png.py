"""PNG files without the parts that say nothing about their pixels and can keep a decoder from reading."""

import struct
import zlib

from PIL import PngImagePlugin

MAX_PROFILE_BYTES = 4 << 20
SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = {b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
"""Ancillary chunks that decide how the image looks: transparency, orientation, frames of an animation."""
TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
ORIENTING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0", b"exif\0")
"""Starts of texts that may contain the orientation."""
# Pillow refuses the whole image if a profile is larger, and its own limit is 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES


def without_foreign_chunks(data: bytes) -> bytes:
    """Return a PNG without ancillary chunks that are not needed, or that are damaged or too large.

    Pillow refuses an image for a wrong checksum or a large text in such a chunk, though its pixels are
    intact. Other data is returned as it is.
    """
    if not data.startswith(SIGNATURE):
        return data

    pieces = [SIGNATURE]
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        kind = data[position + 4 : position + 8]
        # The case of its first letter says whether a chunk is ancillary.
        if not kind[:1].islower() or _is_needed(kind, data[position + 8 : end]):
            pieces.append(data[position:end])
        position = end
    return b"".join([*pieces, data[position:]])


def _is_needed(kind: bytes, content: bytes) -> bool:
    """True if Pillow should see an ancillary chunk, which ends with its checksum."""
    content, checksum = content[:-4], content[-4:]
    if checksum != zlib.crc32(content, zlib.crc32(kind)).to_bytes(4):
        return False
    if kind == b"iCCP":
        # The name of the profile, and the only compression method that exists.
        _, separator, compressed = content.partition(b"\0\0")
        return bool(separator) and _inflates(compressed)
    if kind in TEXTS:
        is_small = len(content) <= MAX_PROFILE_BYTES
        return content.startswith(ORIENTING) and is_small and _inflates(_text(kind, content))
    return kind in KEPT


def _text(kind: bytes, content: bytes) -> bytes:
    """Return the text of a chunk, which may be compressed."""
    _, _, rest = content.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    # Two bytes, the language and the translated keyword come first.
    return rest[2:].split(b"\0", 2)[-1]


def _inflates(compressed: bytes) -> bool:
    """True if a stream does not exceed the limit. Damaged or plain data does not, and Pillow accepts it."""
    stream = zlib.decompressobj()
    try:
        stream.decompress(compressed, MAX_PROFILE_BYTES)
    except zlib.error:
        return True
    return not stream.unconsumed_tail
