"""What both ends of a connection must agree on."""

from __future__ import annotations

from protos import channel
from protos.frames import FRAME_BYTES


def test_the_server_permits_pings_more_often_than_clients_send_them() -> None:
    client = dict(channel.client_options(keepalive_seconds=channel.SHORTEST_KEEPALIVE_SECONDS))
    server = dict(channel.SERVER_OPTIONS)
    permitted = int(server["grpc.http2.min_recv_ping_interval_without_data_ms"])
    assert permitted < int(client["grpc.keepalive_time_ms"])
    assert server["grpc.keepalive_permit_without_calls"] == client["grpc.keepalive_permit_without_calls"] == 1


def test_a_frame_fits_into_a_message_with_room_to_spare() -> None:
    assert 2 * FRAME_BYTES < channel.MAX_MESSAGE_BYTES == 4 << 20
