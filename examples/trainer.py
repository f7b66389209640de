"""GMC in transformers.Trainer.

torchrun --nproc-per-node=2 examples/trainer.py --folder run [--resume]
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gmc_cuda
from gmc_cuda.integrations.transformers import GMCCallback


class Bytes(torch.utils.data.Dataset):
    """Windows of 64 bytes of Python's standard library."""

    def __init__(self):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
        text = b"".join(file.read_bytes() for file in files)
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 64 * 2000].view(
            -1, 64
        )

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        window = self.windows[i].long()
        return {"input_ids": window, "labels": window}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="from the first checkpoint")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(options.folder),
        max_steps=options.steps,
        save_steps=options.save_every,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    model, data = GPT2LMHeadModel(config), Bytes()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.3, "momentum": 0.5, "density": 0.02}),
    )
    trainer.add_callback(GMCCallback(trainer))
    checkpoint = str(options.folder / f"checkpoint-{options.save_every}")
    trainer.train(resume_from_checkpoint=checkpoint if options.resume else None)
    if trainer.is_world_process_zero():
        losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
        (options.folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
