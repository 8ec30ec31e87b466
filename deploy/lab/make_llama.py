"""Makes a small Llama from the shipped text, for trials and tests that cannot reach a hub.

    python -m deploy.lab.make_llama DIRECTORY [--hidden 128] [--pretrain-steps 300] [--hub-cache org/name]

With --hub-cache DIRECTORY becomes a cache as the Hugging Face libraries keep it, with the model as that repository's
only revision: what names the repository then loads offline, by the very code that would download it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import pyarrow.parquet

from deploy.data.make_samples import ALPACA
from protos.digests import digest_of

TEXT = Path(__file__).parents[1] / "data" / ALPACA / "base.parquet"


def texts(*, rows: int | None = None) -> list[str]:
    """Questions with their answers, as plain text: what the base model may have read, and no site holds."""
    read = pyarrow.parquet.read_table(TEXT, columns=["input", "output"]).slice(0, rows).to_pylist()
    return [f"{row['input']}\n{row['output']}" for row in read]


def lay_out_as_hub_cache(model: Path, *, cache: Path, repository: str) -> str:
    """Copies a model directory into a hub cache; the revision, which follows from the files."""
    files = sorted(path for path in model.iterdir() if path.is_file())
    content = "".join(f"{path.name} {digest_of(path.read_bytes())}\n" for path in files)
    revision = digest_of(content.encode())[:40]
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, snapshot / path.name)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    return revision


def main() -> None:
    # Here, because the libraries load slowly and only the training room has them.
    from client_agent.training.small_llama import Pretraining, Sizes, make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--vocabulary", type=int, default=Sizes.vocabulary)
    parser.add_argument("--pretrain-steps", type=int, default=0)
    parser.add_argument("--rows", type=int, help="Take only so many rows of text.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hub-cache", metavar="REPOSITORY")
    chosen = parser.parse_args()

    def tell(done: int, total: int, loss: float) -> None:
        if done % 50 == 0 or done == total:
            print(f"pre-training: step {done} of {total}, loss {loss:.2f}", file=sys.stderr)

    into = chosen.directory / "made" if chosen.hub_cache else chosen.directory
    make(
        into,
        texts=texts(rows=chosen.rows),
        sizes=Sizes(vocabulary=chosen.vocabulary, hidden=chosen.hidden, layers=chosen.layers),
        pretraining=Pretraining(steps=chosen.pretrain_steps),
        seed=chosen.seed,
        threads=chosen.threads,
        on_step=tell,
    )
    if chosen.hub_cache:
        print(lay_out_as_hub_cache(into, cache=chosen.directory, repository=chosen.hub_cache))
        shutil.rmtree(into)


if __name__ == "__main__":
    main()
