from protos.v1 import manifest_pb2 as _manifest_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FindMissingRequest(_message.Message):
    __slots__ = ("blobs",)
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.BlobRef]
    def __init__(self, blobs: _Optional[_Iterable[_Union[_manifest_pb2.BlobRef, _Mapping]]] = ...) -> None: ...

class FindMissingResponse(_message.Message):
    __slots__ = ("missing",)
    MISSING_FIELD_NUMBER: _ClassVar[int]
    missing: _containers.RepeatedCompositeFieldContainer[_manifest_pb2.BlobRef]
    def __init__(self, missing: _Optional[_Iterable[_Union[_manifest_pb2.BlobRef, _Mapping]]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("offset", "checksum", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    checksum: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("offset", "checksum", "data", "target")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    checksum: int
    data: bytes
    target: UploadTarget
    def __init__(self, offset: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ..., target: _Optional[_Union[UploadTarget, _Mapping]] = ...) -> None: ...

class UploadTarget(_message.Message):
    __slots__ = ("task_id", "generation", "blob")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    generation: int
    blob: _manifest_pb2.BlobRef
    def __init__(self, task_id: _Optional[str] = ..., generation: _Optional[int] = ..., blob: _Optional[_Union[_manifest_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class WriteResponse(_message.Message):
    __slots__ = ("committed_size", "sealed")
    COMMITTED_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    committed_size: int
    sealed: bool
    def __init__(self, committed_size: _Optional[int] = ..., sealed: _Optional[bool] = ...) -> None: ...

class QueryWriteStatusRequest(_message.Message):
    __slots__ = ("blob",)
    BLOB_FIELD_NUMBER: _ClassVar[int]
    blob: _manifest_pb2.BlobRef
    def __init__(self, blob: _Optional[_Union[_manifest_pb2.BlobRef, _Mapping]] = ...) -> None: ...

class QueryWriteStatusResponse(_message.Message):
    __slots__ = ("committed_size", "sealed")
    COMMITTED_SIZE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    committed_size: int
    sealed: bool
    def __init__(self, committed_size: _Optional[int] = ..., sealed: _Optional[bool] = ...) -> None: ...
