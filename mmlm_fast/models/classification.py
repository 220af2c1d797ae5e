"""Classes (or numbers) from any set of modalities, fused early, in the middle or late."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import CLASSIFICATION_FUSIONS, MMLMConfig, check_fusion, width_of
from mmlm_fast.models.decoder import MMLMModel
from mmlm_fast.models.encoders import MMLMEncoderModel, MMLMJoin, pool
from mmlm_fast.models.features import last_token, masked_mean
from mmlm_fast.nn import DecisionFusion


@dataclass
class MMLMClassifierOutput(ModelOutput):
    """What a classifier gives.

    Attributes:
        loss: Where labels were given.
        logits: ``[B, num_labels]``; of late fusion, the logarithm of the fused probabilities.
        fusion_weights: How much each modality counts, in the order of `config.modalities`: ``[B, k]``, or the gate
            ``[B, hidden_size]``; None where the fusion has none.
        modality_logits: ``[B, k, num_labels]``, of late fusion.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    fusion_weights: Tensor | None = None
    modality_logits: Tensor | None = None


class MMLMClassificationHead(nn.Module):
    """Dropout, where asked for a hidden layer four times as wide, with GELU, and a linear layer.

    A hidden layer as wide as the features took about twice the steps to learn which modality a question is after.
    """

    def __init__(self, config: MMLMConfig, width: int) -> None:
        super().__init__()
        inner = 4 * width if config.classifier_hidden else width
        self.dense = nn.Linear(width, inner) if config.classifier_hidden else None
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(inner, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        features = self.dropout(features)
        if self.dense is not None:
            features = self.dropout(F.gelu(self.dense(features)))
        return self.out_proj(features)


class MMLMForClassification(MMLMPreTrainedModel):
    """Classification, sentiment, emotion, regression: see `MMLMConfig` for the fusions.

    `config.problem_type` is transformers': ``single_label_classification`` (default), ``multi_label_classification``
    or ``regression``; late fusion is for the first. Late fusion trains each modality's classifier on its own, and
    ``late_weighted`` the weights on the fused decision beside it.
    """

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        check_fusion(config, CLASSIFICATION_FUSIONS, "a classifier")
        self.model: Any
        self.fusion_kind = config.fusion_kind
        decision = self.fusion_kind.decision
        if decision is not None and config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"late fusion is for single_label_classification, got problem_type {config.problem_type!r}"
            )
        modalities: list[str] = config.modalities  # type: ignore[assignment]
        assert config.hidden_size is not None
        width = config.hidden_size
        if self.fusion_kind.is_decoder_based:
            self.model = MMLMModel(config)
        else:
            self.model = MMLMEncoderModel(config)
        if decision is not None:
            self.heads = nn.ModuleDict({m: MMLMClassificationHead(config, width) for m in modalities})
            self.decide = DecisionFusion(decision, len(modalities))
        else:
            if not self.fusion_kind.is_decoder_based:
                self.join = MMLMJoin(config)
                if config.joint_config is not None:
                    width = width_of(config.joint_config)
            self.classifier = MMLMClassificationHead(config, width)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MMLMClassifierOutput:
        """Classify samples. Inputs are those of `MMLMModel` (``merge``, ``gated_cross_attention``) or
        `MMLMEncoderModel`; labels ``[B]``, or ``[B, num_labels]`` of 0 and 1 for several at once.

        Raises:
            ValueError: for labels out of range, on a CPU; on CUDA a device-side assertion fails.
        """
        inputs: dict[str, Any] = dict(input_ids=input_ids, pixel_values=pixel_values, input_features=input_features)
        inputs |= dict(image_mask=image_mask, audio_mask=audio_mask, attention_mask=attention_mask)
        if self.fusion_kind.is_decoder_based:
            states = self.model(**inputs, use_cache=False).last_hidden_state
            if self.config.pooling == "last":
                features = last_token(states, attention_mask)
            else:
                mask = torch.ones(states.shape[:2], device=states.device) if attention_mask is None else attention_mask
                features = masked_mean(states, mask.bool())
            return self._output(self.classifier(features), labels)
        encoded = self.model(**inputs)
        if self.fusion_kind.decision is not None:
            return self._decide(encoded, labels)
        tokens, mask, weights = self.join(encoded)
        if self.fusion_kind.is_pooled:
            features = tokens[:, 0]
        else:
            features = masked_mean(tokens, mask) if self.config.pooling == "mean" else last_token(tokens, mask)
        return self._output(self.classifier(features), labels, fusion_weights=weights)

    def _output(self, logits: Tensor, labels: Tensor | None, **more: Any) -> MMLMClassifierOutput:
        loss = None
        if labels is not None:
            problem = self.config.problem_type
            if problem == "regression":
                loss = F.mse_loss(logits.float().squeeze(-1), labels.float().reshape(logits.squeeze(-1).shape))
            elif problem == "multi_label_classification":
                loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
            else:
                loss = F.cross_entropy(logits.float(), self._checked(labels))
        return MMLMClassifierOutput(loss=loss, logits=logits, **more)

    def _checked(self, labels: Tensor) -> Tensor:
        count = self.config.num_labels
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            wrong = (labels != -100) & ((labels < 0) | (labels >= count))
            if wrong.any():
                row = int(wrong.nonzero()[0, 0])
                raise ValueError(f"labels must be from 0 to {count - 1}, got {int(labels[row])} in row {row}")
        return labels

    def _decide(self, encoded: dict[str, Any], labels: Tensor | None) -> MMLMClassifierOutput:
        present = torch.stack([e.present for e in encoded.values()], 1)
        each = [self.heads[m](pool(m, e, self.config.pooling)) for m, e in encoded.items()]
        decided = self.decide(each, present)
        logits = decided.clamp(min=torch.finfo(decided.dtype).tiny).log()
        loss = None
        if labels is not None:
            target = self._checked(labels)
            errors = torch.stack([F.cross_entropy(x.float(), target, reduction="none") for x in each], 1)
            counted = present & (target != -100)[:, None]
            loss = torch.where(counted, errors, 0).sum() / counted.sum().clamp(min=1)
            if self.decide.mode == "weighted":
                loss = loss + F.nll_loss(logits, target)
        weights = None
        if self.decide.weight is not None:
            weights = self.decide.weight.detach().masked_fill(~present, -torch.inf).softmax(-1).nan_to_num()
        return MMLMClassifierOutput(
            loss=loss, logits=logits, fusion_weights=weights, modality_logits=torch.stack(each, 1)
        )
