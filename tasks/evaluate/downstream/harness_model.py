"""lm-eval's model over a loaded checkpoint: its own requests and scores, with fewer tokens computed for them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from tasks import architectures
from tasks.evaluate.downstream import trie

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW = 512
"""Nodes of a row. Attention takes the square: of SmolLM2-135M's products a seventh at 512, two fifths at 2048."""


class Packed(HFLM):  # type: ignore[misc]
    """Scores likelihoods over tries of token ids; what else is asked for, and by other models, is lm-eval's own code.

    The log-softmax is in float32, and over the positions that have a continuation alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int, dtype: str) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            mixed_precision_dtype=None if dtype == "float32" else dtype,
            softmax_dtype="float32",
        )
        self._quiet = not sys.stderr.isatty()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, without a progress bar where nobody looks at it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, without a progress bar where nobody looks at it."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self._quiet)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, without a progress bar where nobody looks at it."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self._quiet)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of each (text, context, continuation)."""
        read = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in requests]
        if not requests or not takes_tries(self.model, longest=max(map(len, read))):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
        answers: dict[int, tuple[float, bool]] = {}
        made = trie.rows(read, most=ROW)
        for i in range(0, len(made), self.batch_size):
            batch = made[i : i + self.batch_size]
            hidden_BLD = self._hidden(batch)
            for row, hidden_LD in zip(batch, hidden_BLD, strict=True):
                targets = {number: requests[number][2] for number in row.paths}
                answers |= self._score(row, hidden_LD, targets)
        return [answers[number] for number in range(len(requests))]

    def _autocast(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _hidden(self, rows: list[trie.Row]) -> Tensor:
        longest = max(len(row.ids) for row in rows)
        ids_BL, depths_BL = torch.zeros(2, len(rows), longest, dtype=torch.long)
        seen_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
        for b, row in enumerate(rows):
            nodes = len(row.ids)
            ids_BL[b, :nodes] = torch.tensor(row.ids)
            depths_BL[b, :nodes] = torch.tensor(row.depths)
            seen_BLL[b, :nodes, :nodes] = torch.from_numpy(row.ancestors())
        mask = seen_BLL[:, None].to(self.device)
        if self.model.config._attn_implementation == "eager":  # it adds the mask to the scores
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill_(
                ~mask, torch.finfo(self.model.dtype).min
            )
        with torch.no_grad(), self._autocast():
            out = self.model.base_model(
                input_ids=ids_BL.to(self.device),
                attention_mask=mask,
                position_ids=depths_BL.to(self.device),
                use_cache=False,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _score(self, row: trie.Row, hidden_LD: Tensor, targets: dict[int, list[int]]) -> dict[int, tuple[float, bool]]:
        """The answers of a row's sequences, whose last nodes predict their continuations."""
        ends = {number: row.paths[number][-len(tokens) :] for number, tokens in targets.items()}
        nodes = sorted({node for path in ends.values() for node in path})
        place = {node: i for i, node in enumerate(nodes)}
        scaling = getattr(self.model.config, "logits_scaling", 1.0)
        with torch.no_grad(), self._autocast():
            logits_NV = self.model.get_output_embeddings()(hidden_LD[nodes]) / scaling
        greedy_N = logits_NV.argmax(-1).tolist()
        of = [place[node] for path in ends.values() for node in path]
        wanted = [token for number in ends for token in targets[number]]
        nats = torch.log_softmax(logits_NV, -1, dtype=self.softmax_dtype)[of, wanted].tolist()
        answers, at = {}, 0
        for number, path in ends.items():
            stop = at + len(path)
            chosen = [greedy_N[i] for i in of[at:stop]]
            answers[number] = (sum(nats[at:stop]), chosen == list(targets[number]))
            at = stop
        return answers


def takes_tries(model: PreTrainedModel, *, longest: int) -> bool:
    """Whether a model attends by a mask that it is given, of sequences of `longest` tokens at most."""
    config = model.config
    known = config.model_type in architectures.DENSE or config.model_type in architectures.SPARSE
    window = getattr(config, "sliding_window", None)
    return known and config._attn_implementation in {"sdpa", "eager"} and (not window or longest <= window)
