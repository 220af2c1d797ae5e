"""An accelerated model in the loops that people train with: Trainer, resumed; DDP, FSDP2; quantised; in a plugin."""

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import mmlm_fast
from mmlm_fast import cli
from mmlm_fast.hf import MmlmFastCallback, NothingReplaced
from mmlm_fast.ops.paths import Path as OpPath
from mmlm_fast.ops.paths import forced
from support import families, tiny_models
from support.families import MODELS

ROOT = Path(__file__).parents[1]
SAME = {"rtol": 1e-6, "atol": 2e-6}  # as in tests/test_hf_whole_models.py; here up to 4.8e-7
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _quiet():
    with tiny_models.quiet():
        yield


def text_model():
    return MODELS["llama"]().build("sdpa").train()


def step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def names_of_changed(model):
    return {type(m).__name__ for m in model.modules() if hasattr(type(m), "_mmlm_fast_layers")}


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def trainer(folder, model, callbacks=(), **options):
    rows = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]

    def collate(samples):
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=1e-3, logging_steps=1, report_to=[], seed=0, disable_tqdm=True, data_seed=0, save_steps=2,
        max_steps=6, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=list(callbacks)
    )


def losses(of):
    return torch.tensor([h["loss"] for h in of.state.log_history if "loss" in h])


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bfloat16"])
def test_a_trainer_resumed_from_a_checkpoint(options, tmp_path):
    """The loss curve of the original, also where the second half goes on from what the first saved."""
    stock = trainer(tmp_path / "stock", text_model(), **options)
    stock.train()
    callback = MmlmFastCallback(quiet=True)
    with forced(OpPath.NATIVE):
        first = trainer(tmp_path / "ours", text_model(), [callback], **options)
        assert len(callback.done) == 1
        first.train()
        again = trainer(tmp_path / "ours", text_model(), [MmlmFastCallback(quiet=True)], **options)
        again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    assert len(callback.done) == 1
    tolerance = torch.finfo(torch.bfloat16).eps if options else 1e-5
    torch.testing.assert_close(losses(first), losses(stock), rtol=tolerance, atol=0)
    torch.testing.assert_close(losses(again), losses(stock), rtol=tolerance, atol=0)
    plain = text_model()
    plain.load_state_dict(first.model.state_dict())
    assert names_of_changed(first.model)
    callback.undo()
    assert not names_of_changed(first.model)


def test_a_callback_for_a_model_that_is_made_later():
    callback = MmlmFastCallback(quiet=True, only=["RMS norm"])
    callback.on_init_end(None, None, None, model=None)
    assert not callback.done
    model = text_model()
    callback.on_train_begin(None, None, None, model=nn.Sequential(model))
    callback.on_train_begin(None, None, None, model=nn.Sequential(model))
    assert {r.kind for r in callback.done[0].replaced} == {"RMS norm"}
    assert names_of_changed(model) == {"LlamaRMSNorm"}


# ---- distributed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("option", ["none", "find_unused_parameters", "static_graph"])
def test_distributed_data_parallel(option, when, group):
    found = []
    for fast in (False, True):
        model = text_model()
        if fast and when == "before":
            mmlm_fast.accelerate(model, quiet=True)
        wrapped = nn.parallel.DistributedDataParallel(model, **({} if option == "none" else {option: True}))
        if fast and when == "after":
            mmlm_fast.accelerate(wrapped, quiet=True)
        with forced(OpPath.NATIVE):
            step(wrapped)
            found.append(step(wrapped))
    torch.testing.assert_close(*found, **SAME)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fully_sharded(when, group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for fast in (False, True):
        model, mesh = text_model(), init_device_mesh("cpu", (1,))
        if fast and when == "before":
            done = mmlm_fast.accelerate(model, quiet=True)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        if fast and when == "after":
            done = mmlm_fast.accelerate(model, quiet=True)
            assert "its weight is DTensor, whole only in its forward" in str(done)
            assert {"attention", "gated MLP", "rotary embedding"} <= {r.kind for r in done.replaced}
        with forced(OpPath.NATIVE):
            found.append(step(model))
        if fast:
            done.undo()
            assert not names_of_changed(model)
            step(model)
    torch.testing.assert_close(*found, **SAME)


def test_quantised_layers():
    """They are called, not read: what is around them is replaced."""
    model, plain = (text_model().eval() for _ in range(2))
    for m in (model, plain):
        torch.ao.quantization.quantize_dynamic(m.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    done = mmlm_fast.accelerate(model, quiet=True)
    assert {"gated MLP", "RMS norm", "attention"} <= {r.kind for r in done.replaced}, str(done)
    with forced(OpPath.NATIVE), torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
        exact = text_model().eval()(input_ids=IDS).logits
    # Rounding may move an activation by one step of its 8 bits, which is small beside what these bits err themselves.
    assert (ours - theirs).abs().max() <= 0.1 * (theirs - exact).abs().max()


# ---- where people are ------------------------------------------------------------------------------------------------


def code_of(page, word):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if word in block)


def test_the_plugin_of_the_docs(monkeypatch):
    """Of axolotl, whose base class a stub stands for."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    names = {}
    exec(code_of("accelerate.md", "BasePlugin"), names)
    model = text_model()
    names["MmlmFastPlugin"]().post_model_load(SimpleNamespace(), model)
    assert "LlamaMLP" in names_of_changed(model)


def test_the_command(tmp_path, capsys):
    model = text_model()
    model.save_pretrained(tmp_path)
    assert cli.main(["accelerate", "--plan", str(tmp_path)]) == 0
    assert "would replace 5 × LlamaRMSNorm (RMS norm; not verified)" in capsys.readouterr().out
    assert cli.main(["accelerate", str(tmp_path), "--json", "--dtype", "bfloat16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {r["kind"] for r in said["replaced"]} >= {"attention", "RMS norm"}
    assert all(math.isfinite(r["max_difference"]) for r in said["replaced"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["accelerate", "--plan", str(tmp_path / "none")])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["accelerate", str(tmp_path), "--dtype", "float33"])
    assert "dtype must be auto or a dtype of torch" in capsys.readouterr().err


def test_ranks_other_than_the_first_are_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    mmlm_fast.accelerate(text_model())
    assert not capsys.readouterr().out
    assert issubclass(NothingReplaced, ValueError)


def test_a_version_that_nobody_has_seen_is_said(monkeypatch):
    assert "none of those that this was tested with" not in str(mmlm_fast.accelerate(text_model(), quiet=True))
    monkeypatch.setattr("mmlm_fast.hf.acceleration.transformers.__version__", "6.0.0.dev0")
    said = str(mmlm_fast.accelerate(text_model(), quiet=True))
    assert "transformers 6.0.0.dev0 is none of those that this was tested with (5.17.0 to 5.24.0)" in said


def test_the_committed_table_of_families():
    """`python -m support.families --write`, under each version of transformers that it names."""
    known = json.loads(families.FILE.read_text(encoding="utf-8"))
    page = families.PAGE.read_text(encoding="utf-8")
    assert families.table(known) == page.partition(families.BEGIN)[2].partition(families.END)[0]
    if transformers.__version__ in known:
        assert set(known[transformers.__version__]) == set(MODELS)
        for name in ("qwen2_5_vl", "gemma4", "granite_speech", "clip"):
            assert families.found(name) == known[transformers.__version__][name]
