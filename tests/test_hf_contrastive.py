"""CLIP's and SigLIP's losses in forwards of transformers' models: the same numbers without any pair's similarity."""

import copy
import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import mmlm_fast
from mmlm_benchmarks.harness import peak_memory_mib
from mmlm_fast.hf.fingerprint import source_tree
from mmlm_fast.hf.kinds import contrastive
from mmlm_fast.hf.kinds.contrastive import KIND
from mmlm_fast.nn import on_demand
from mmlm_fast.nn.lazy_similarity import LazySimilarity
from support import tiny_models
from support.tiny_models import encoder_text, vision

PAIRS = 400  # enough for the native core
TOWERS = dict(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _quiet():
    with tiny_models.quiet():
        yield


def clip():
    text, image = encoder_text(projection_dim=32, **TOWERS), vision(image_size=28, **TOWERS)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=32))


def siglip():
    text, image = encoder_text(projection_size=32, **TOWERS), vision(image_size=28, **TOWERS)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=image))


def chinese_clip():
    text, image = encoder_text(**TOWERS), vision(image_size=28, **TOWERS)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=image, projection_dim=32)
    return transformers.ChineseCLIPModel(config)


def dual_encoder():
    text = transformers.BertConfig(**encoder_text(**TOWERS))
    image = transformers.ViTConfig(**vision(image_size=28, **TOWERS))
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=32)
    return transformers.VisionTextDualEncoderModel(config)


def blip():
    text = encoder_text(encoder_hidden_size=32, bos_token_id=1, pad_token_id=0, sep_token_id=2, **TOWERS)
    config = transformers.BlipConfig(text_config=text, vision_config=vision(image_size=28, **TOWERS), projection_dim=32)
    return transformers.BlipModel(config)


MODELS = {f.__name__: f for f in (clip, siglip, chinese_clip, dual_encoder, blip)}


def inputs_of(pairs=PAIRS):
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(5, 60, (pairs, 6), generator=generator),
        "pixel_values": torch.randn(pairs, 3, 28, 28, generator=generator),
    }


def pair(name):
    """An accelerated model and its original."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    original = copy.deepcopy(model)
    mmlm_fast.accelerate(model, only=[KIND], quiet=True)
    return model, original


def step(model, inputs, use=lambda out: 0.0, amp=False):
    """Loss and all gradients as one vector, and the output."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(**inputs, return_loss=True)
    (out.loss + use(out)).backward()
    grads = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    return torch.cat([out.loss.detach().reshape(1), *grads]).double(), out


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def is_unread(out):
    return isinstance(out.logits_per_text, LazySimilarity) and out.logits_per_text._shared.tensor is None


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_original(name):
    """Loss, every gradient and both matrices of logits, which are computed when read and not before."""
    model, original = pair(name)
    inputs = inputs_of()
    found, out = step(model, inputs)
    expected, theirs = step(original, inputs)
    assert error(found, expected) < 1e-6
    assert is_unread(out)
    assert out.loss.dtype == theirs.loss.dtype
    assert out.loss.shape == theirs.loss.shape
    assert torch.equal(out.logits_per_text, theirs.logits_per_text)
    assert torch.equal(out.logits_per_image, theirs.logits_per_image)
    assert out.logits_per_image.stride() == theirs.logits_per_image.stride()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_logits_have_gradients_too(name):
    """A second loss of them, and of the copy in float32 that mixed precision makes."""
    for use in (
        lambda out: 100 * out.logits_per_image.tanh().mean(),
        lambda out: 1000 * out.logits_per_text.float().log_softmax(1).diagonal().mean(),
        lambda out: out.logits_per_text.diagonal().sum() + 100 * out.logits_per_image[0, 1],
    ):
        model, original = pair(name)
        inputs = inputs_of()
        found, _ = step(model, inputs, use)
        assert error(found, step(original, inputs, use)[0]) < 1e-6
        assert error(found, step(original, inputs)[0]) > 1e-5  # it counts


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_under_autocast(name):
    """Against float64: no worse than the original, and in its dtype."""
    model, original = pair(name)
    exact = copy.deepcopy(original).double()
    inputs = inputs_of()
    doubles = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    found, out = step(model, inputs, amp=True)
    expected, theirs = step(original, inputs, amp=True)
    truth, _ = step(exact, doubles)
    assert is_unread(out)
    assert out.loss.dtype == theirs.loss.dtype
    assert out.logits_per_text.dtype == theirs.logits_per_text.dtype
    assert error(found, truth) < 1.1 * error(expected, truth)
    copied = out.logits_per_image.float()
    assert is_unread(out)
    assert torch.equal(copied, theirs.logits_per_image.float())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_quarter_of_the_memory(name):
    """Of a loss of 1,024 pairs, beside towers that need next to none."""
    taken = []
    for model in pair(name):
        inputs = inputs_of(1024)
        features = [torch.randn(1024, 32) for _ in range(2)]
        _features_given(model, features)
        step(model, inputs)
        taken.append(min(peak_memory_mib(lambda m=model, i=inputs: step(m, i), ()) for _ in range(3)))
    ours, theirs = taken
    assert theirs > 12  # at least three matrices of 4 MiB
    assert ours <= theirs / 4, taken


def _features_given(model, features):
    """Towers that give the same features, as parameters, whatever they are handed."""
    image, text = (nn.Parameter(x) for x in features)
    output = transformers.modeling_outputs.BaseModelOutputWithPooling
    if hasattr(model, "get_image_features") and type(model).__name__.startswith("CLIP"):
        model.get_image_features = lambda *args, **kwargs: output(pooler_output=image)
        model.get_text_features = lambda *args, **kwargs: output(pooler_output=text)
    else:
        model.vision_model.forward = lambda *args, **kwargs: output(pooler_output=image)
        model.text_model.forward = lambda *args, **kwargs: output(pooler_output=text)


def test_where_the_product_itself_serves():
    """Evaluation, no gradients, no loss wanted, few pairs, undone, hooks on saved tensors: the original's bits."""
    model, original = pair("clip")
    inputs = inputs_of()

    def plain(**options):
        out, theirs = (m(**(inputs | options.pop("other", {})), **options) for m in (model, original))
        assert type(out.logits_per_text) is torch.Tensor
        assert torch.equal(out.logits_per_text, theirs.logits_per_text)
        assert (out.loss is None) == (theirs.loss is None)
        assert out.loss is None or torch.equal(out.loss, theirs.loss)

    plain()
    with torch.no_grad():
        plain(return_loss=True)
    with torch.inference_mode():
        plain(return_loss=True)
    with mmlm_fast.reference():
        plain(return_loss=True)
    with torch.autograd.graph.save_on_cpu():
        plain(return_loss=True)
    few = inputs_of(8)
    out, theirs = (m(**few, return_loss=True) for m in (model, original))
    assert torch.equal(out.loss, theirs.loss)
    model.eval(), original.eval()
    plain(return_loss=True)
    model.train(), original.train()
    mmlm_fast.accelerate(model, only=[KIND], quiet=True, strict=False).undo()


def _classes():
    """Every class of transformers whose forward holds a loss that we know, by name, and how its op is called."""
    root, found = Path(transformers.__file__).parent / "models", {}
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "contrastive_loss(" in text or "logsigmoid(" in text:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            for cls in vars(module).values():
                forward = (
                    inspect.unwrap(vars(cls)["forward"]) if inspect.isclass(cls) and "forward" in vars(cls) else None
                )
                if forward is not None and forward.__module__ == module.__name__:
                    for loss in contrastive.losses(source_tree(forward), forward.__globals__):
                        found[cls.__name__] = (loss, forward.__globals__)
    return found


def test_every_relative_is_known_and_proved():
    """The proof runs the loss of the installed version of transformers."""
    found = _classes()
    wanted = (
        "AltCLIPModel BlipModel CLIPModel CLIPSegModel ChineseCLIPModel ClvpModelForConditionalGeneration "
        "GroupViTModel MetaClip2Model OwlViTModel Owlv2Model Siglip2Model SiglipModel VisionTextDualEncoderModel"
    )
    assert set(wanted.split()) <= set(found)
    for name, (loss, globals_) in found.items():
        assert loss.op == ("siglip_loss" if "Siglip" in name else "clip_loss"), name
        for dtype in (torch.float32, torch.bfloat16):
            assert contrastive.prove(loss, globals_, torch.empty(0, dtype=dtype)) < 0.02, name


def test_undo():
    torch.manual_seed(0)
    model = clip().train()
    original = copy.deepcopy(model)
    report = mmlm_fast.accelerate(model, quiet=True)
    assert [r.kind for r in report.replaced].count(KIND) == 1
    step(model, inputs_of())
    report.undo()
    found, out = step(model, inputs_of())
    assert type(out.logits_per_text) is torch.Tensor
    assert torch.equal(found, step(original, inputs_of())[0])


def test_logits_that_are_read_every_time():
    """Are computed at once from the third step on, which is said once; the numbers stay."""
    model, original = pair("clip")
    inputs, expected = inputs_of(), None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(4):
            found, out = step(model, inputs)
            assert isinstance(out.logits_per_text, LazySimilarity) == (i < 2)
            out.logits_per_text.argmax(1)
            expected = step(original, inputs)[0] if expected is None else expected
            assert error(found, expected) < 1e-6
    assert len([w for w in told if "logits are read beside its loss" in str(w.message)]) == 1
    assert on_demand.habit_of(model).plain


def test_features_changed_in_place():
    model, _ = pair("clip")
    out = model(**inputs_of(), return_loss=True)
    with torch.no_grad():
        out.text_embeds.mul_(2)
    with pytest.raises(RuntimeError, match="features they are made of were changed in place"):
        out.logits_per_text.sum()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_second_derivatives(name):
    """Of the loss and of logits, with respect to the scale."""
    found = []
    for model in pair(name):
        out = model.double()(**{k: x.double() if x.is_floating_point() else x for k, x in inputs_of().items()},
                             return_loss=True)  # fmt: skip
        for value in (out.loss, out.logits_per_text.square().mean()):
            (first,) = torch.autograd.grad(value, model.logit_scale, create_graph=True)
            found.append(torch.autograd.grad(first.sum(), model.logit_scale, retain_graph=True)[0])
    for a, b in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_whole():
    """Activation checkpointing around the model: computed twice, with the product itself."""
    model, original = pair("clip")
    inputs = inputs_of()
    found = []
    for m in (model, original):
        m.zero_grad()
        loss = checkpoint(lambda ids, pixels, m=m: m(ids, pixels, return_loss=True).loss,
                          inputs["input_ids"], inputs["pixel_values"], use_reentrant=False)  # fmt: skip
        loss.backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in m.parameters() if p.grad is not None]))
    assert error(*found) < 1e-6


def test_in_trainer_with_bfloat16(tmp_path):
    """Which copies the outputs of a model to float32: that reads no logits, and the losses stay the stock ones."""
    inputs, losses = inputs_of(2 * PAIRS), []
    rows = [{key: x[i] for key, x in inputs.items()} for i in range(2 * PAIRS)]
    for model in pair("clip"):
        options = TrainingArguments(
            tmp_path, per_device_train_batch_size=PAIRS, max_steps=4, logging_steps=1, bf16=True, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip

        def collate(samples):
            return {key: torch.stack([s[key] for s in samples]) for key in samples[0]} | {"return_loss": True}

        trainer = Trainer(model, options, train_dataset=rows, data_collator=collate)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        habit = on_demand.habit_of(model)  # of the original nothing is counted
        assert (habit.losses, habit.reads) == ((4, 0) if len(losses) == 1 else (0, 0))
    tolerance = torch.finfo(torch.bfloat16).eps / 4  # the original's logits are rounded to it
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=tolerance, atol=0)


def test_a_loss_that_is_another_is_left():
    """One factor more, or a target of its own: no known fingerprint, no site."""

    class Warmer(transformers.CLIPModel):
        def forward(self, input_ids=None, pixel_values=None, return_loss=None, **kwargs):
            out = super().forward(input_ids, pixel_values, **kwargs)
            if return_loss:
                out.loss = nn.functional.cross_entropy(out.logits_per_text * 2, torch.arange(len(input_ids)))
            return out

    model = Warmer(clip().config).train()
    report = mmlm_fast.accelerate(model, quiet=True)
    assert KIND not in [s.kind for s in report.replaced]


def test_logits_that_are_changed_on_the_way():
    """Between product and loss: the loss takes the numbers, and is that of the original."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    class Biased(transformers.CLIPModel):
        def forward(self, input_ids=None, pixel_values=None, return_loss=None):
            image = self.get_image_features(pixel_values).pooler_output
            text = self.get_text_features(input_ids).pooler_output
            logits = torch.matmul(text, image.t()) * self.logit_scale.exp() + torch.linspace(0, 1, len(text))
            loss = None
            if return_loss:
                loss = image_text_contrastive_loss(logits)
            return transformers.models.clip.modeling_clip.CLIPOutput(loss=loss, logits_per_text=logits)

    globals()["image_text_contrastive_loss"] = image_text_contrastive_loss
    torch.manual_seed(0)
    model = Biased(clip().config).train()
    original = copy.deepcopy(model)
    report = mmlm_fast.accelerate(model, only=[KIND], quiet=True)
    assert [s.kind for s in report.replaced] == [KIND]
    assert error(step(model, inputs_of())[0], step(original, inputs_of())[0]) < 1e-6
