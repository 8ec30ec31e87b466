"""Makes a small encoder of BERT's, ALBERT's or DistilBERT's kind from the shipped text, for trials without a hub.

    python -m deploy.lab.make_trio DIRECTORY --kind distilbert --pretrain-steps 2000
    python -m deploy.lab.make_trio DIRECTORY --kind bert --text sentences.parquet

The text is questions to an assistant (CLINC150) and medical questions with their answers (MedQuAD), none of which any
site or test of the shipped recipes has. With --text it is a table with a column `text`, or a text file with one text a
line. --sentence-encoder is the directory of the model whose answers the poolers learn to give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet

from deploy.data.make_intents import CLINC150
from deploy.lab.make_llama import texts as medical_texts
from protos.errors import SilotuneError

SENTENCES = Path(__file__).parents[1] / "data" / CLINC150 / "base.parquet"
TRIO = ("bert", "albert", "distilbert")


def texts(path: Path | None = None) -> list[str]:
    """What the base models read: the shipped text, or that of a file."""
    if path is None:
        return _column(SENTENCES) + medical_texts()
    if path.suffix == ".parquet":
        return _column(path)
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _column(path: Path) -> list[str]:
    return [str(text) for text in pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist() if text]


def main() -> None:
    # Here, because the libraries load slowly and only the training room has them.
    from client_agent.training.small_trio import Pretraining, Sizes, make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--kind", choices=TRIO, required=True)
    parser.add_argument("--hidden", type=int, default=Sizes.hidden)
    parser.add_argument("--layers", type=int, default=Sizes.layers, help='Twice what a "distilbert" then has.')
    parser.add_argument("--vocabulary", type=int, default=Sizes.vocabulary)
    parser.add_argument("--pretrain-steps", type=int, default=0)
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--sentence-encoder", type=Path, metavar="DIRECTORY")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()

    def tell(done: int, total: int, loss: float) -> None:
        if done % 100 == 0 or done == total:
            print(f"pre-training: step {done} of {total}, loss {loss:.2f}", file=sys.stderr)

    try:
        make(
            chosen.directory,
            kind=chosen.kind,
            texts=texts(chosen.text),
            sizes=Sizes(vocabulary=chosen.vocabulary, hidden=chosen.hidden, layers=chosen.layers),
            pretraining=Pretraining(steps=chosen.pretrain_steps),
            seed=chosen.seed,
            sentence_encoder=chosen.sentence_encoder,
            threads=chosen.threads,
            on_step=tell,
        )
    except SilotuneError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
