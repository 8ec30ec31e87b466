"""LoRA on an 8B-shaped Llama: silotune's training next to transformers' Trainer and TRL's SFTTrainer, side by side.

    python -m tests.gpu.bench_llm                one GPU, under 8 minutes; nothing is downloaded
    python -m tests.gpu.bench_llm --tiny         the same on a CPU with a model of two layers: a trial, no measurement

All train the same adapters (rank 32 on q_proj and v_proj) on the same rows (512 tokens, of which 352 are the
completion; batches of 16) with random weights, in 4 bits and in bfloat16. What differs is named in the table:

    silotune            the functions that a trainer of an agent calls, as it calls them
    Trainer             transformers' defaults, with bf16
    SFTTrainer          TRL's defaults (bf16, gradient checkpointing), and without checkpointing where memory allows
    SFTTrainer (study)  what the FlowerTune medical study runs: load_in_4bit with the library's defaults (fp4, computing
                        in float32), prepare_model_for_kbit_training, no bf16. In today's TRL, faster than then.

TRL is no dependency of silotune: `pip install trl` on the machine that measures. Without it its lines say so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from client_agent.training.adapters import federated, leave_casts_to_autocast, with_adapters
from client_agent.training.causal import CausalLanguageModel, CausalTokens
from client_agent.training.model import Model
from client_agent.training.quantization import compute_dtype, keep_layout
from client_agent.training.train import prepare, train
from protos import jobspec
from tests.gpu.random_llama import LLAMA_3_8B, TINY, Shape, make_network, make_tokenizer

BATCH = 16
RANK, ALPHA, DROPOUT, TARGETS = 32, 64, 0.075, ("q_proj", "v_proj")
LEARNING_RATE = 5e-5
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Work:
    """What all contestants do."""

    shape: Shape
    device: torch.device
    rows: list[dict[str, list[int]]]  # input_ids, labels (-100 on the prompt)
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return BATCH * len(self.rows[0]["input_ids"])


@dataclass
class Result:
    contestant: str
    base: str
    checkpointing: bool
    micro_batch: int = BATCH
    tokens_per_second: float = 0.0
    peak_gib: float = 0.0
    first_loss: float = 0.0
    note: str = ""


@dataclass
class Stopwatch:
    """The time between the end of the warm-up and that of the last step, with the device's work done."""

    work: Work
    began: float = 0.0
    seconds: float = 0.0

    def step(self, done: int) -> None:
        if done in (WARM_UP_STEPS, WARM_UP_STEPS + self.work.steps):
            if self.work.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.began, self.seconds = (now, 0.0) if done == WARM_UP_STEPS else (self.began, now - self.began)


# From network, rows to train on at once, and a stopwatch: the first step's loss.
Contestant = Callable[[LlamaForCausalLM, Work, int, Stopwatch, Result], float]


def silotune(network: LlamaForCausalLM, work: Work, micro: int, watch: Stopwatch, result: Result) -> float:
    length = len(work.rows[0]["input_ids"])
    local = {
        "steps": WARM_UP_STEPS + work.steps, "batch_size": BATCH, "micro_batch_size": micro,
        "learning_rate": LEARNING_RATE, "max_gradient_norm": 1.0, "gradient_checkpointing": result.checkpointing,
    }  # fmt: skip
    spec = jobspec.parse(
        {
            "name": "bench", "task": {"type": "causal-lm", "max_length": length}, "data": {"name": "rows"}, "rounds": 1,
            "base_model": {"name": "random", "dtype": "bfloat16"}, "evaluation": {"metric": "loss"}, "local": local,
            "method": {"type": "lora", "rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "targets": TARGETS},
        }
    )  # fmt: skip
    prepare(device=work.device, threads=1 if work.device.type == "cpu" else 0)
    keep_layout(network)
    adapted = with_adapters(network, spec=spec, peft_type="CAUSAL_LM", missing=(), name="random")
    if compute_dtype(spec.local, device=work.device) == torch.bfloat16:
        leave_casts_to_autocast(adapted)
    tensors = federated(adapted)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = Model(adapted, make_tokenizer(work.shape.vocabulary), work.device, tensors, shapes)
    tokens = CausalTokens(
        ids=torch.tensor([row["input_ids"] for row in work.rows], dtype=torch.int32).flatten(),
        learnt=torch.tensor([row["labels"] for row in work.rows]).flatten() >= 0,
        starts=torch.arange(len(work.rows) + 1) * length, positions=None, pad_id=0, examples=len(work.rows), skipped=0,
    )  # fmt: skip
    losses: list[float] = []

    def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
        losses.extend(value for name, value in metrics.items() if name == "loss")
        watch.step(done)

    assert isinstance(spec.task, jobspec.CausalLm)
    try:
        train(
            model, tokens=tokens, task=CausalLanguageModel(spec.task), local=spec.local, steps=spec.local.steps or 0,
            learning_rate_at=lambda step: LEARNING_RATE, seed=0, on_step=on_step,
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)  # The others shall not pay for what only silotune promises.
    return losses[0]


def transformers_trainer(network: LlamaForCausalLM, work: Work, micro: int, watch: Stopwatch, result: Result) -> float:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(**_arguments(work, micro, result, directory=directory))
        adapted: Any = get_peft_model(network, _lora())
        rows: Any = work.rows
        runner = Trainer(
            adapted, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[_Watching(watch)]
        )
        return _run(runner)


def trl_sft(network: LlamaForCausalLM, work: Work, micro: int, watch: Stopwatch, result: Result) -> float:
    return _sft(network, work, micro, watch, result, {})


def trl_sft_of_the_study(network: LlamaForCausalLM, work: Work, micro: int, watch: Stopwatch, result: Result) -> float:
    prepare_model_for_kbit_training(network, use_gradient_checkpointing=True)
    return _sft(
        network, work, micro, watch, result, {"bf16": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    )


def _sft(
    network: LlamaForCausalLM, work: Work, micro: int, watch: Stopwatch, result: Result, changes: dict[str, Any]
) -> float:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as directory:
        fields = _arguments(work, micro, result, directory=directory) | changes
        arguments = SFTConfig(
            **fields, max_length=len(work.rows[0]["input_ids"]), dataset_kwargs={"skip_prepare_dataset": True}
        )
        runner = SFTTrainer(
            network, args=arguments, train_dataset=Dataset.from_list(work.rows), peft_config=_lora(),
            processing_class=make_tokenizer(work.shape.vocabulary), callbacks=[_Watching(watch)],
        )  # fmt: skip
        return _run(runner)


def _lora() -> LoraConfig:
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )


def _arguments(work: Work, micro: int, result: Result, *, directory: str) -> dict[str, Any]:
    on_gpu = work.device.type == "cuda"
    return {
        "output_dir": directory, "per_device_train_batch_size": micro, "gradient_accumulation_steps": BATCH // micro,
        "max_steps": WARM_UP_STEPS + work.steps, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "bf16": on_gpu, "use_cpu": not on_gpu, "gradient_checkpointing": result.checkpointing, "max_grad_norm": 1.0,
        "logging_steps": 10_000, "logging_first_step": True, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip


class _Watching(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.step(state.global_step)


def _run(runner: Trainer) -> float:
    runner.train()
    return next(float(entry["loss"]) for entry in runner.state.log_history if "loss" in entry)


# (name, who, the base's bits, gradient checkpointing), the most telling first.
LINES: tuple[tuple[str, Contestant, str, bool], ...] = (
    ("silotune", silotune, "nf4", False),
    ("silotune", silotune, "nf4", True),
    ("SFTTrainer (study)", trl_sft_of_the_study, "fp4", True),
    ("SFTTrainer", trl_sft, "nf4", False),
    ("SFTTrainer", trl_sft, "nf4", True),
    ("Trainer", transformers_trainer, "nf4", False),
    ("Trainer", transformers_trainer, "nf4", True),
    ("silotune", silotune, "none", False),
    ("silotune", silotune, "none", True),
    ("SFTTrainer", trl_sft, "none", False),
    ("SFTTrainer", trl_sft, "none", True),
    ("Trainer", transformers_trainer, "none", False),
    ("Trainer", transformers_trainer, "none", True),
)


def measure(line: tuple[str, Contestant, str, bool], work: Work) -> Result:
    """One line of the table; the micro-batch is halved until it fits."""
    name, contestant, base, checkpointing = line
    result = Result(name, "bf16" if base == "none" else base, checkpointing)
    if name.startswith("SFT") and importlib.util.find_spec("trl") is None:
        result.note = "trl is not installed"
        return result
    compute = torch.float32 if contestant is trl_sft_of_the_study else torch.bfloat16
    while result.micro_batch:
        network: LlamaForCausalLM | None = None  # The one that did not fit must go before another comes.
        gc.collect()
        if work.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        watch = Stopwatch(work)
        try:
            network = make_network(work.shape, quantization=base, compute=compute, device=work.device)
            result.first_loss = contestant(network, work, result.micro_batch, watch, result)
        except torch.OutOfMemoryError:
            result.micro_batch //= 2
            continue
        except Exception as error:
            if contestant is silotune:
                raise
            # Another version of a library than this was written for must not cost the other lines.
            traceback.print_exc()
            result.note = f"failed: {type(error).__name__}"
            return result
        result.tokens_per_second = work.steps * work.tokens_per_step / watch.seconds
        if work.device.type == "cuda":
            result.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        return result
    result.note = "out of memory"
    return result


def make_rows(*, vocabulary: int, length: int, count: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    prompt = length * 5 // 16
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids.tolist()]


def table(results: list[Result]) -> str:
    study = next((r.tokens_per_second for r in results if "study" in r.contestant), 0.0)
    text = f"{'':20} {'base':>5} {'checkpointing':>13} {'micro':>5} {'tokens/s':>9} {'x study':>8} {'GiB':>6}    loss\n"
    for r in results:
        ratio = f"{r.tokens_per_second / study:8.2f}" if study else f"{'-':>8}"
        numbers = f"{r.micro_batch:5} {r.tokens_per_second:9.0f} {ratio} {r.peak_gib:6.1f} {r.first_loss:7.3f}"
        text += f"{r.contestant:20} {r.base:>5} {'yes' if r.checkpointing else 'no':>13} {r.note or numbers}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA training: silotune, Trainer, SFTTrainer")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with a model of two layers")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after the warm-up")
    parser.add_argument("--budget-seconds", type=float, default=420, help="after these no further line is begun")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --tiny tries everything out on the CPU")
    shape, device = (TINY, "cpu") if given.tiny else (LLAMA_3_8B, "cuda")
    rows = make_rows(vocabulary=shape.vocabulary, length=32 if given.tiny else 512, count=4 * BATCH)
    work = Work(shape, torch.device(device), rows, given.steps)
    began, results = time.monotonic(), []
    for line in LINES:
        if time.monotonic() - began > given.budget_seconds:
            results.append(Result(line[0], line[2], line[3], note="not run: out of time"))
            continue
        results.append(measure(line, work))
        print(f"{time.monotonic() - began:5.0f} s  {results[-1]}", flush=True)
    what = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny: a trial, no measurement"
    print(f"\n{what}; torch {torch.__version__}\n{table(results)}")
    if given.json:
        given.json.write_text(json.dumps({"device": what, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
