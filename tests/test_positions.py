"""Positions against transformers' own loops over tokens and pictures."""

import random

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.vision_utils import get_vision_position_ids

from mmlm_fast.positions import mrope_positions, vision_positions
from support import tiny_models

# Before 5.18 transformers cut second_per_grid_ts to whole seconds, and half a second to none: there only whole ones are
# compared.
TRUNCATES_SECONDS = Version(transformers.__version__) < Version("5.18")


def draw(seed: int, frames_apart: bool) -> dict:
    """Three samples of text, pictures and videos, padded on one side."""
    rnd = random.Random(seed)
    rows, images, videos, seconds = [], [], [], []
    for _ in range(3):
        row = [0] * rnd.randint(1, 5)
        for _ in range(rnd.randint(0, 4)):
            h, w = 2 * rnd.randint(1, 4), 2 * rnd.randint(1, 4)
            if rnd.random() < 0.5:
                images.append([1, h, w])
                row += [1] * (h * w // 4)
            else:
                t = rnd.randint(1, 3)
                videos.append([t, h, w])
                seconds.append(rnd.choice([0.5, 1.0, 2.0]))
                for _ in range(t if frames_apart else 1):
                    row += [2] * (h * w // 4 * (1 if frames_apart else t)) + [0] * (2 if frames_apart else 0)
            row += [0] * rnd.randint(1, 4)
        rows.append(row)
    length = max(map(len, rows))
    left = seed % 2 == 1

    def pad(row, fill):
        padding = [fill] * (length - len(row))
        return padding + row if left else row + padding

    return {
        "mm_token_type_ids": torch.tensor([pad(r, 0) for r in rows]),
        "attention_mask": torch.tensor([pad([1] * len(r), 0) for r in rows]),
        "image_grid_thw": torch.tensor(images) if images else None,
        "video_grid_thw": torch.tensor(videos) if videos else None,
        "second_per_grid_ts": torch.tensor(seconds) if seconds else None,
    }


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_equal_to_get_rope_index(name):
    tiny = getattr(tiny_models, name)()
    model = tiny.build("eager").model
    apart = name == "qwen3_vl"
    rate = None if apart else model.config.vision_config.tokens_per_second
    for seed in range(60):
        given = draw(seed, apart)
        if apart or seed % 3 == 0:
            given["second_per_grid_ts"] = None
        if given["second_per_grid_ts"] is not None and TRUNCATES_SECONDS:
            given["second_per_grid_ts"] = given["second_per_grid_ts"].trunc()
        theirs = {k: v for k, v in given.items() if v is not None}
        expected = model.get_rope_index(input_ids=torch.zeros_like(given["mm_token_type_ids"]), **theirs)
        video = given["video_grid_thw"]
        if apart and video is not None:  # a frame is an item
            given["video_grid_thw"] = torch.tensor([[1, h, w] for t, h, w in video.tolist() for _ in range(t)])
        kinds = given.pop("mm_token_type_ids")
        positions, deltas = mrope_positions(kinds, tokens_per_second=rate, frames_apart=apart, **given)
        assert positions.equal(expected[0]), seed
        assert deltas.equal(expected[1]), seed


def test_pictures_side_by_side():
    """Two pictures with no text between, which transformers' loop takes for one."""
    kinds = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    positions, deltas = mrope_positions(kinds, image_grid_thw=torch.tensor([[1, 4, 4], [1, 2, 2]]))
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    assert deltas.tolist() == [[-2]]


def test_compiles_without_breaks():
    given = draw(4, False)
    kinds = given.pop("mm_token_type_ids")
    compiled = torch.compile(lambda k, **g: mrope_positions(k, **g), fullgraph=True, backend="aot_eager")
    assert compiled(kinds, **given)[0].equal(mrope_positions(kinds, **given)[0])


def test_disagreement_is_never_silent():
    kinds = torch.tensor([[0, 1, 1, 1, 0]])
    grid = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match="mm_token_type_ids and grids must agree"):
        mrope_positions(kinds, image_grid_thw=grid)
    with pytest.raises(ValueError, match="must agree"):
        mrope_positions(kinds)
    with pytest.raises(ValueError, match="must agree"):  # text inside a picture
        mrope_positions(torch.tensor([[1, 0, 1, 1, 1]]), image_grid_thw=grid)
    with pytest.raises(ValueError, match="must agree"):
        mrope_positions(torch.tensor([[3, 0]]))
    with pytest.raises(RuntimeError, match="must agree"):  # what CUDA does by default
        mrope_positions(kinds, image_grid_thw=grid, check=False)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 5\)"):
        mrope_positions(kinds, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"must be \[B, S\]"):
        mrope_positions(kinds[0])


def test_empty():
    positions, deltas = mrope_positions(torch.zeros(2, 0, dtype=torch.int64))
    assert positions.shape == (3, 2, 0)
    assert deltas.shape == (2, 1)


@pytest.mark.parametrize("merge", [1, 2])
def test_vision_positions(merge):
    grid = torch.tensor([[1, 4, 6], [3, 2, 2], [2, 8, 4]])
    expected = get_vision_position_ids(grid, merge)
    assert vision_positions(grid, merge)[:, 0].equal(expected.T)
    assert vision_positions(grid, merge, 24 + 12 + 64)[:, 0].equal(expected.T)
    assert vision_positions(grid[:0], merge).shape == (2, 1, 0)
    with pytest.raises(ValueError, match=r"grid_thw must be \[items, 3\]"):
        vision_positions(grid[0])
