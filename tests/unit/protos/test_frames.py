"""Frames written by hand are protobuf to the byte; a damaged or misplaced one never passes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import frames
from protos.errors import CorruptData, InvalidInput
from protos.v1 import manifest_pb2, transfer_pb2

OFFSETS = (1, 4096, frames.FRAME_BYTES, (1 << 40) + 3, (1 << 64) - 1)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("size", [1, 127, 128, 16_384, frames.FRAME_BYTES])
def test_a_frame_is_what_protobuf_itself_would_write(offset: int, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    fields = {"offset": offset, "checksum": frames.checksum(data, offset=offset), "data": data}
    encoded = frames.encode(data, offset=offset)
    assert encoded == transfer_pb2.ReadResponse(**fields).SerializeToString()
    assert encoded == transfer_pb2.WriteRequest(**fields).SerializeToString()


@given(st.binary(max_size=300), st.integers(0, (1 << 64) - 1))
def test_protobuf_reads_every_frame(data: bytes, offset: int) -> None:
    """At offset 0 protobuf would leave the field out; it reads the zero that stands here all the same."""
    parsed = transfer_pb2.ReadResponse.FromString(frames.encode(data, offset=offset))
    assert (parsed.offset, parsed.data) == (offset, data)
    assert parsed.checksum == frames.checksum(data, offset=offset)


@given(st.binary(max_size=300), st.integers(0, (1 << 64) - 1))
def test_a_frame_comes_back_as_it_was(data: bytes, offset: int) -> None:
    frame = frames.decode(frames.encode(data, offset=offset))
    assert (frame.offset, bytes(frame.data), frame.target) == (offset, data, None)


@given(st.binary(min_size=1, max_size=300), st.integers(0, (1 << 64) - 1))
def test_a_frame_of_another_client_is_read_too(data: bytes, offset: int) -> None:
    message = transfer_pb2.WriteRequest(offset=offset, checksum=frames.checksum(data, offset=offset), data=data)
    frame = frames.decode(message.SerializeToString())
    assert (frame.offset, bytes(frame.data)) == (offset, data)


def test_the_opening_frame_names_the_upload_and_carries_nothing() -> None:
    blob = manifest_pb2.BlobRef(digest="ab" * 32, size=3 << 30)
    target = transfer_pb2.UploadTarget(task_id="job-1-site", generation=2, blob=blob)
    frame = frames.decode(frames.encode_target(target))
    assert frame.target == target
    assert len(frame.data) == 0


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_flipped_bit_anywhere_is_noticed(data: bytes, draw: st.DataObject) -> None:
    encoded = bytearray(frames.encode(data, offset=77))
    bit = draw.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    try:
        frame = frames.decode(bytes(encoded))
    except (CorruptData, InvalidInput):
        return
    # What is left is a message whose data field is gone: it brings no bytes.
    assert len(frame.data) == 0


def test_a_frame_in_another_place_does_not_match_its_checksum() -> None:
    data = b"0123456789"
    moved = transfer_pb2.WriteRequest(offset=20, checksum=frames.checksum(data, offset=10), data=data)
    with pytest.raises(CorruptData, match="frame at byte 20"):
        frames.decode(moved.SerializeToString())


def test_a_truncated_frame_is_refused() -> None:
    encoded = frames.encode(b"0123456789", offset=10)
    for length in range(1, len(encoded)):
        try:
            assert len(frames.decode(encoded[:length]).data) == 0
        except (CorruptData, InvalidInput):
            continue


def test_a_frame_above_the_limit_is_refused() -> None:
    data = bytes(frames.FRAME_BYTES + 1)
    message = transfer_pb2.WriteRequest(offset=1, checksum=frames.checksum(data, offset=1), data=data)
    for encoded in (message.SerializeToString(), frames.encode(data, offset=1)):
        with pytest.raises(InvalidInput, match="the limit is"):
            frames.decode(encoded)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_refusal(junk: bytes) -> None:
    with suppress(CorruptData, InvalidInput):
        frames.decode(junk)
