from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]
    ENCODING_BF16: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]
    ENCODING_INT4: _ClassVar[Encoding]
    ENCODING_SVD: _ClassVar[Encoding]

class Form(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FORM_UNSPECIFIED: _ClassVar[Form]
    FORM_VALUES: _ClassVar[Form]
    FORM_DELTA: _ClassVar[Form]
ENCODING_UNSPECIFIED: Encoding
ENCODING_RAW: Encoding
ENCODING_BF16: Encoding
ENCODING_INT8: Encoding
ENCODING_INT4: Encoding
ENCODING_SVD: Encoding
FORM_UNSPECIFIED: Form
FORM_VALUES: Form
FORM_DELTA: Form

class BlobRef(_message.Message):
    __slots__ = ("digest", "size")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class FileRef(_message.Message):
    __slots__ = ("name", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    blob: BlobRef
    def __init__(self, name: _Optional[str] = ..., blob: _Optional[_Union[BlobRef, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("blob", "encoding", "form", "base_version", "block")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    blob: BlobRef
    encoding: Encoding
    form: Form
    base_version: int
    block: int
    def __init__(self, blob: _Optional[_Union[BlobRef, _Mapping]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., form: _Optional[_Union[Form, str]] = ..., base_version: _Optional[int] = ..., block: _Optional[int] = ...) -> None: ...
