"""The two frame messages of TransferService, written and read by hand.

Under grpc.aio a protobuf `bytes` field of 1 MiB costs twice the time of raw bytes, so the stubs of Read and Write
are registered with identity serialisers and the frames are made here. They stay ordinary protobuf: any other client
may use the generated classes, and `decode` falls back to them when the fields come in another order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from protos.errors import CorruptData, InvalidInput
from protos.v1 import transfer_pb2

FRAME_BYTES = 1 << 20
_HEAD = struct.Struct("<BQBQB")
_OFFSET_TAG, _CHECKSUM_TAG, _DATA_TAG = 0x09, 0x11, 0x1A


@dataclass(frozen=True)
class Frame:
    offset: int
    data: memoryview
    target: transfer_pb2.UploadTarget | None = None


def checksum(data: bytes | memoryview, *, offset: int) -> int:
    """XXH3-64 seeded with the offset, so that a frame in the wrong place is as wrong as a flipped bit."""
    return xxhash.xxh3_64_intdigest(data, seed=offset)


def encode(data: bytes | memoryview, *, offset: int) -> bytes:
    """One frame: ReadResponse, or WriteRequest without a target. `data` is at most FRAME_BYTES."""
    head = _HEAD.pack(_OFFSET_TAG, offset, _CHECKSUM_TAG, checksum(data, offset=offset), _DATA_TAG)
    return b"".join((head, _varint(len(data)), data))


def encode_target(target: transfer_pb2.UploadTarget) -> bytes:
    """The opening frame of a Write: names the upload, carries no data."""
    return transfer_pb2.WriteRequest(target=target).SerializeToString()


def decode(message: bytes) -> Frame:
    """The frame in `message`, its checksum verified.

    InvalidInput: not a frame. CorruptData: the checksum does not match.
    """
    frame = _decode_fast(message)
    if frame is None:
        frame = _decode_any(message)
    return frame


def _decode_fast(message: bytes) -> Frame | None:
    if len(message) < _HEAD.size + 1:
        return None
    tag_1, offset, tag_2, expected, tag_3 = _HEAD.unpack_from(message)
    if (tag_1, tag_2, tag_3) != (_OFFSET_TAG, _CHECKSUM_TAG, _DATA_TAG):
        return None
    length, start = _read_varint(message, _HEAD.size)
    if start + length != len(message):
        return None
    data = memoryview(message)[start:]
    _verify(data, offset=offset, expected=expected)
    return Frame(offset=offset, data=data)


def _decode_any(message: bytes) -> Frame:
    try:
        parsed = transfer_pb2.WriteRequest.FromString(message)
    except Exception as error:
        raise InvalidInput("A transfer frame could not be decoded.") from error
    if len(parsed.data) > FRAME_BYTES:
        raise InvalidInput(f"A transfer frame has {len(parsed.data)} bytes; the limit is {FRAME_BYTES}.")
    if parsed.data:
        _verify(memoryview(parsed.data), offset=parsed.offset, expected=parsed.checksum)
    target = parsed.target if parsed.HasField("target") else None
    return Frame(offset=parsed.offset, data=memoryview(parsed.data), target=target)


def _verify(data: memoryview, *, offset: int, expected: int) -> None:
    if len(data) > FRAME_BYTES:
        raise InvalidInput(f"A transfer frame has {len(data)} bytes; the limit is {FRAME_BYTES}.")
    if checksum(data, offset=offset) != expected:
        raise CorruptData(f"The frame at byte {offset} does not match its checksum.", offset=offset)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 35:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidInput("A transfer frame could not be decoded.")
