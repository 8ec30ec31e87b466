"""`silotune model add`: a base model's directory goes to the coordinator, which serves it to sites that lack it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from coordinator.client import OperatorClient
from protos.digests import new_hasher
from protos.errors import InvalidInput
from protos.model_files import BASE_COMPANIONS, BASE_WEIGHTS
from protos.v1 import manifest_pb2, operator_pb2

HASH_BYTES = 1 << 20
# The coordinator looks at each file once more.
ADD_TIMEOUT_SECONDS = 60.0


def add(client: OperatorClient, *, name: str, directory: Path, on_file: Callable[[str, int], None]) -> tuple[str, int]:
    """(digest, bytes in all) once the coordinator has every file. `on_file` gets a name and what is done of it.

    Only safetensors, configuration and tokenizer go. What was uploaded before is not sent again.
    InvalidInput: the directory holds no model.
    """
    paths = sorted([*directory.glob(BASE_WEIGHTS), *(directory / each for each in BASE_COMPANIONS)])
    files = {path.name: path for path in paths if path.is_file()}
    if "config.json" not in files or not any(each.endswith(".safetensors") for each in files):
        raise InvalidInput(
            f"{directory} holds no base model: config.json and .safetensors weights are needed.",
            hint="Other formats may run code; convert the model first.",
        )
    listed = [
        manifest_pb2.FileRef(
            name=each, blob=manifest_pb2.BlobRef(digest=_digest(path, on_file=on_file), size=path.stat().st_size)
        )
        for each, path in files.items()
    ]
    request = operator_pb2.AddBaseModelRequest(name=name, files=listed)
    while True:
        answer: operator_pb2.AddBaseModelResponse = client.ask(
            "AddBaseModel", request, timeout_seconds=ADD_TIMEOUT_SECONDS
        )
        if not answer.missing:
            return answer.digest, sum(file.blob.size for file in listed)
        for file in answer.missing:
            client.write(files[file.name], file.blob.digest, on_bytes=partial(on_file, file.name))


def _digest(path: Path, *, on_file: Callable[[str, int], None]) -> str:
    hasher, done = new_hasher(), 0
    with path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            hasher.update(data)
            done += len(data)
            on_file(path.name, done)
    return hasher.hexdigest()
