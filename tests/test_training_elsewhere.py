"""The models under what else people train with: PEFT, Lightning, DDP."""

import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

from mmlm_fast.models import MMLMForClassification, MMLMForConditionalGeneration, MMLMForSeq2SeqLM, presets
from mmlm_fast.training import Collator
from mmlm_fast.training.builtin import digits

LABELS = [str(i) for i in range(10)]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", ["token_merge_vlm", "transformer_encoder_decoder", "resnet_text_classifier"])
def test_peft(name, tmp_path):
    """LoRA on attention: only adapters move, adapters alone are saved, loaded they give the same bits; merged, the same
    answers."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    cls, task, targets = {
        "token_merge_vlm": (MMLMForConditionalGeneration, "captioning", ["q_proj", "v_proj"]),
        "transformer_encoder_decoder": (MMLMForSeq2SeqLM, "captioning", ["c_attn"]),
        "resnet_text_classifier": (MMLMForClassification, "classification", ["query", "value"]),
    }[name]
    config, processor = presets.PRESETS[name].build(audio_seconds=2)
    base = cls(config)
    kind = "caption" if task == "captioning" else "question"
    batch = Collator(task, base, processor, labels=LABELS)(digits(kind, "train", count=4))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=4))
    model.eval()  # ResNet's running averages, which training moves, are no part of an adapter
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # LoRA's B starts at zero, and A's gradient with it
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all("lora_" in n for n in moved)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(**batch).logits
    again = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(**batch).logits, expected)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    expected = again.double()(**batch).logits
    torch.testing.assert_close(again.merge_and_unload()(**batch).logits, expected)


def test_lightning(tmp_path):
    """The example of README: the model is a plain module."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class LitModel(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_index):
            loss = self.model(**batch).loss
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    torch.manual_seed(0)
    config, processor = presets.resnet_text_classifier(image_size=32, resnet_width=8, classifier_dropout=0.0)
    model = MMLMForClassification(config)
    collate = Collator("classification", model, processor, labels=LABELS, modalities=["text", "image"])
    samples = digits("pair", "train", count=64)
    before = model.eval()(**collate(samples)).loss
    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(LitModel(model.train()), torch.utils.data.DataLoader(samples, batch_size=8, collate_fn=collate))
    assert model.eval()(**collate(samples)).loss < 0.8 * before


def test_ddp_over_two_processes(tmp_path):
    """`torchrun … mmlm-fast train` over Gloo: a classifier whose towers have poolers that nothing uses."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from mmlm_fast.cli import main
            sys.exit(main(["train", "digits_pairs", "--quiet", "--output", "{tmp_path}/out", "--overwrite", "--set",
                           "data.train_count=32", "data.eval_count=16", "training.max_steps=2", "training.use_cpu=true",
                           "training.ddp_backend=gloo", "evaluation.controls=[]", "training.save_strategy=no"]))
            """
        )
    )
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/metrics.json").is_file()
