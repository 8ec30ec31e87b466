"""gRPC channel settings that both ends must agree on.

Keepalive: the server must permit pings at least as often as clients send them, or it answers with GOAWAY
"too many pings". Messages stay far below gRPC's default 4 MiB, so nobody turns a size knob.
"""

from __future__ import annotations

from protos.frames import FRAME_BYTES

KEEPALIVE_SECONDS = 20
MAX_MESSAGE_BYTES = 4 << 20
assert FRAME_BYTES + 1024 < MAX_MESSAGE_BYTES

# Bytes that may be under way on one stream before the reader has taken them. gRPC's own probing lets them grow to
# many megabytes for each stream, which is memory of the coordinator for nothing: 1 MiB is enough for 280 Mbit/s over
# 30 ms, and several streams share a link.
_WINDOW: list[tuple[str, int | str]] = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 20)]

# A line that is gone is noticed after the keepalive time and the wait for its answer, with calls on it or without.
# Both of gRPC's timeouts are needed: the ping's own is a minute by default, and where something on the way still takes
# the packets it is the only one that cuts.
_ANSWER_SECONDS = 10
_ANSWER: list[tuple[str, int | str]] = [
    ("grpc.keepalive_timeout_ms", _ANSWER_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", _ANSWER_SECONDS * 1000),
]
# A site behind a NAT that forgets quickly may ping so often.
SHORTEST_KEEPALIVE_SECONDS = 5


def client_options(*, keepalive_seconds: float = KEEPALIVE_SECONDS) -> list[tuple[str, int | str]]:
    return [
        *_WINDOW,
        ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
        *_ANSWER,
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # One connection for each channel object: eight streams on one connection run at a third of the speed.
        ("grpc.use_local_subchannel_pool", 1),
    ]


CLIENT_OPTIONS = client_options()

SERVER_OPTIONS: list[tuple[str, int | str]] = [
    *_WINDOW,
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    *_ANSWER,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", SHORTEST_KEEPALIVE_SECONDS * 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    # Two coordinators on one port would share its connections at random; the second must fail instead.
    ("grpc.so_reuseport", 0),
]
