"""Fine-tuning by TRL's SFTTrainer under accelerate: adapter, soft prompt, semantic-id rows and LoRA on histories.

On one GPU, several, or a CPU (two minutes on the embedded catalogue):

    accelerate launch --config_file training/accelerate/one_gpu.yaml -m genrec.training.finetune --run runs/NAME
    accelerate launch --config_file training/accelerate/cpu.yaml -m genrec.training.finetune --run runs/demo

`genrec run` does the same in one process. Every position of a history is trained in one pass, histories are packed,
and the best state on validation N@10 is what remains. Killed, it resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from genrec.backbone import Backbone
from genrec.metrics import per_user
from genrec.ranking import rank_cases
from genrec.splits import Cases
from genrec.training.packing import PackedCollator, blank_row, packed_rows
from genrec.training.texts import text_samples
from genrec.workspace import Workspace

log = logging.getLogger(__name__)
WEIGHTS = "trained.safetensors"
VALID_BEAMS = 20
LOGGING_STEPS = int(os.environ.get("GENREC_LOGGING_STEPS", "10"))


def samples(space: Workspace) -> list[dict[str, np.ndarray]]:
    """The packed training rows: one sequence per history, plus the mixture's texts."""
    prompter, settings = space.prompter, space.recipe.finetune
    prompts = [prompter.next_item(history) for history in space.split.train if len(history)]
    prompts += text_samples(space)
    longest = max(len(p.input_ids) for p in prompts)
    rows = packed_rows(prompts, max(settings.pack_tokens, longest))
    return [rows[i] for i in np.random.default_rng(space.recipe.seed).permutation(len(rows))]


def processes() -> int:
    """How many processes train together."""
    return int(PartialState(cpu=not torch.cuda.is_available()).num_processes)


class BackboneTrainer(SFTTrainer):
    """SFTTrainer over packed histories: our loss, our validation metric, checkpoints of what is trained only."""

    def __init__(self, *, space: Workspace, valid: Cases, **arguments: Any):
        """
        Args:
            space: the run.
            valid: cases whose N@10 decides which state is best.
            arguments: SFTTrainer's own.
        """
        self.space, self.valid = space, valid
        super().__init__(**arguments)
        # else every micro-batch counts the same, however many targets it holds
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the targets' losses over the targets of the whole (accumulated, distributed) batch."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradient average over processes divides it again
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """N@10 on the validation cases, ranked over the full catalogue by constrained beams."""
        backbone: Backbone = self.accelerator.unwrap_model(self.model)
        training = backbone.training
        backbone.eval()
        # every process evaluates the same cases: their number is small and early stopping must agree everywhere
        top = rank_cases(
            backbone,
            self.space.prompter,
            self.valid,
            available=self.space.catalogue.available,
            exclude_seen=self.space.recipe.data.exclude_seen,
            beams=VALID_BEAMS,
        )
        backbone.train(training)
        scores = per_user(top, self.valid.targets)
        metrics = {
            "eval_ndcg@10": float(scores["ndcg@10"].mean()),
            "eval_recall@10": float(scores["recall@10"].mean()),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log without TRL's per-token metrics, which need full logits."""
        super(SFTTrainer, self).log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.accelerator.unwrap_model(self.model).trained_state(), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(model or self.model).load_trained(
            load_file(Path(resume_from_checkpoint) / WEIGHTS)
        )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def sft_config(space: Workspace, folder: Path, n_rows: int) -> SFTConfig:
    """TRL's settings for this run; every automatic choice is logged with its reason."""
    s = space.recipe.finetune
    cuda = torch.cuda.is_available()
    bf16 = s.mixed_precision == "bf16" or (s.mixed_precision == "auto" and cuda and torch.cuda.is_bf16_supported())
    log.info(
        "mixed precision: %s",
        "bf16" if bf16 else "none (small matrices gain nothing from bf16 on a CPU)" if not cuda else "none",
    )
    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_rows,
        gradient_accumulation_steps=s.accumulate,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=s.warmup,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not cuda,
        seed=space.recipe.seed,
        gradient_checkpointing=s.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True},
        shuffle_dataset=False,
        packing=False,
        max_length=None,
        remove_unused_columns=False,
        logging_steps=LOGGING_STEPS,
        report_to=["tensorboard"],
        save_only_model=False,
        save_total_limit=2,
        dataloader_pin_memory=cuda,
        dataloader_num_workers=0,
        ddp_find_unused_parameters=False,
        disable_tqdm=None,
        eval_strategy="steps",
        save_strategy="steps",
        metric_for_best_model="ndcg@10",
        greater_is_better=True,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on where it was
    )
    per_step = s.batch_rows * s.accumulate * config.world_size
    steps = max(1, round(config.num_train_epochs * -(-n_rows // per_step)))
    config.eval_steps = config.save_steps = max(1, -(-steps // s.evals))
    log.info(
        "finetune: %d rows / (%d rows x %d accumulated x %d processes) x %g epochs = about %d steps, %d evaluations",
        n_rows, s.batch_rows, s.accumulate, config.world_size, s.epochs, steps, s.evals,
    )  # fmt: skip
    return config


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; what a kill left half-written is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        try:
            json.loads((Path(last) / "trainer_state.json").read_text(encoding="utf-8"))  # the trainer's last file
            return str(last)
        except (OSError, ValueError):
            log.warning("finetune: %s was cut short, removed", last)
            shutil.rmtree(last)
    return None


def finetune(space: Workspace, checkpoints: Path) -> tuple[Backbone, dict[str, Any]]:
    """Train the backbone on the split's histories.

    Args:
        space: a run whose alignment is there.
        checkpoints: where checkpoints and TensorBoard logs go; a last one there is resumed from.

    Returns:
        the best state on validation, and {"curve", "best_ndcg@10", "trainable_parameters", "rows", "tokens"}.
    """
    settings = space.recipe.finetune
    rows = samples(space)
    n_rows = len(rows)
    # else accelerate repeats rows to fill the last batch of every process, and gradients depend on their number
    rows += [blank_row(space.layout)] * (-n_rows % (settings.batch_rows * settings.accumulate * processes()))
    backbone = space.backbone(tuned=True)
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    log.info("backbone: %d parameters, %d trained", sum(p.numel() for p in backbone.parameters()), trainable)
    trainer = BackboneTrainer(
        space=space,
        valid=space.chooses,
        model=backbone,
        args=sft_config(space, checkpoints, len(rows)),
        train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows]),
        eval_dataset=Dataset.from_list([{"input_ids": [0]}]),  # evaluate() ranks `valid` instead
        processing_class=space.tokenizer,
        data_collator=PackedCollator(space.layout),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=settings.patience)],
    )
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        last = last_checkpoint(checkpoints)
    if last is not None:
        log.info("finetune: resuming from %s", Path(last).name)
    trainer.train(resume_from_checkpoint=last)
    best: Backbone = trainer.accelerator.unwrap_model(trainer.model)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_ndcg@10" in entry]
    return best.eval(), {
        "curve": history,
        "best_ndcg@10": trainer.state.best_metric,
        "trainable_parameters": trainable,
        "rows": n_rows,
        "tokens": int(sum(len(row["input_ids"]) for row in rows)),
    }


def save_finetuned(backbone: Backbone, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write trained.safetensors and curve.json into a stage's folder; returns the manifest's result."""
    save_file(backbone.trained_state(), folder / WEIGHTS)
    (folder / "curve.json").write_text(json.dumps(result["curve"], indent=1), encoding="utf-8")
    return {k: v for k, v in result.items() if k != "curve"}


def main() -> None:
    """Fine-tune a run from the command line, alone or under accelerate launch."""
    from genrec.pipeline import Run

    parser = argparse.ArgumentParser(description="fine-tune a run whose alignment is there")
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--force", action="store_true", help="train again even when nothing changed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Run.open(arguments.run).finetune(force=arguments.force)


if __name__ == "__main__":
    main()
