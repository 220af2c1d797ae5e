"""Search by embeddings: text to pictures or sound and back."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


class EmbeddingIndex:
    """Exact nearest neighbours by inner product, by FAISS where it is installed.

    Args:
        embeddings: ``[N, D]``, float; cosine similarity if normalised, as those of `MMLMForContrastive` are.
        items: What each stands for.
        engine: ``faiss``, ``exact`` (NumPy), or ``auto``: FAISS if it is there.

    Raises:
        ValueError: for shapes that do not go together, another engine, or FAISS asked for and missing.
    """

    def __init__(self, embeddings: Any, items: Sequence[Any], *, engine: str = "auto") -> None:
        table = np.ascontiguousarray(_array(embeddings), np.float32)
        if table.ndim != 2 or len(table) != len(items):
            raise ValueError(f"embeddings must be [{len(items)}, D], one an item, got {table.shape}")
        if engine not in ("auto", "faiss", "exact"):
            raise ValueError(f"engine must be auto, faiss or exact, got {engine!r}")
        self.items, self.table, self.faiss = list(items), table, None
        if engine != "exact":
            try:
                import faiss
            except ImportError as error:
                if engine == "faiss":
                    raise ValueError("engine 'faiss' needs faiss: pip install faiss-cpu") from error
            else:
                self.faiss = faiss.IndexFlatIP(table.shape[1])
                self.faiss.add(table)

    def __len__(self) -> int:
        return len(self.items)

    def search(self, queries: Any, k: int = 10) -> list[list[tuple[Any, float]]]:
        """Return the `k` most similar items of each query ``[Q, D]``, the best first, with their similarities."""
        wanted = np.ascontiguousarray(np.atleast_2d(_array(queries)), np.float32)
        if wanted.shape[1] != self.table.shape[1] or k < 1:
            raise ValueError(f"queries must be [Q, {self.table.shape[1]}] and k at least 1, got {wanted.shape} and {k}")
        k = min(k, len(self))
        if k == 0:
            return [[] for _ in wanted]
        if self.faiss is not None:
            scores, rows = self.faiss.search(wanted, k)
        else:
            every = wanted @ self.table.T
            rows = np.argsort(-every, 1, kind="stable")[:, :k]
            scores = np.take_along_axis(every, rows, 1)
        return [
            [(self.items[i], float(s)) for i, s in zip(row, score, strict=True)]
            for row, score in zip(rows, scores, strict=True)
        ]


def _array(values: Any) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


@torch.no_grad()
def embed(model: Any, batches: Iterable[dict[str, Any]], modality: str, *, progress: bool = False) -> torch.Tensor:
    """Embed one modality of batches of its processor by `MMLMForContrastive`, ``[N, D]``.

    Raises:
        ValueError: for a modality that is not text, image or audio.
    """
    inputs = {
        "text": ("input_ids", "attention_mask"),
        "image": ("pixel_values", "image_mask"),
        "audio": ("input_features", "audio_mask"),
    }
    if modality not in inputs:
        raise ValueError(f"modality must be text, image or audio, got {modality!r}")
    function = getattr(model, f"get_{modality}_features")
    parts = []
    for batch in tqdm(batches, desc=f"embedding {modality}", disable=not progress, leave=False):
        arguments = {name: batch[name].to(model.device) for name in inputs[modality] if name in batch}
        parts.append(function(**arguments).float().cpu())
    return torch.cat(parts)
