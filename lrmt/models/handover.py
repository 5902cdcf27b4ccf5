"""The hand-over: from the hidden state that a segment leaves to a vector that the next one can read as it reads text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrmt.models.scoring import widened

KINDS = ("identity", "scaled", "aligned", "tokens")
RIDGE = 1e-2  # of the mean variance of a hidden unit
LIKELY = 16  # tokens of which a mean is made: what the others say is next to nothing


class HandOver(nn.Module):
    """In most decoders a final hidden state is no input embedding: it is larger, and points elsewhere.

    identity: the state as it is (Bulatov et al. 2022). scaled: of the size of token embeddings. aligned: an affine map `[d, d]` from the
    state to the embedding of the token that the head would say there, fitted before training (`fit`) and fixed: buffers, which ZeRO-3
    leaves whole. tokens: the mean embedding of what the head says, each of the likeliest tokens by its probability; what is sure is
    handed over as the embedding itself, so that what an earlier segment has blurred is sharp again.
    """

    def __init__(self, kind: str, embeddings: Tensor):
        super().__init__()
        self.kind = kind
        if kind == "scaled":
            self.register_buffer("size", embeddings.detach().float().pow(2).mean().sqrt())
        if kind == "aligned":
            width, device = embeddings.shape[-1], embeddings.device
            self.register_buffer("weight", torch.eye(width, device=device))
            self.register_buffer("bias", torch.zeros(width, device=device))

    def forward(self, hidden: Tensor, logits: Tensor | None, embed: nn.Module) -> Tensor:
        """Hidden states `[B, k, d]` to vectors `[B, k, d]`, computed in fp32 or wider.

        Args:
            logits: `[B, k, V]`, what the head says there; of tokens alone. embed: the backbone's embedding.
        """
        if self.kind == "identity":
            return hidden
        if self.kind == "tokens":
            share, ids = widened(logits).softmax(-1).topk(min(LIKELY, logits.shape[-1]))
            share = share / share.sum(-1, keepdim=True)
            return (share[..., None].to(hidden.dtype) * embed(ids)).sum(-2)
        wide = widened(hidden)
        if self.kind == "scaled":
            wide = wide * self.size / wide.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                wide = nn.functional.linear(wide, self.weight.to(wide.dtype), self.bias.to(wide.dtype))
        return wide.to(hidden.dtype)

    @torch.no_grad()
    def fit(self, hidden: Tensor, embeddings: Tensor) -> float:
        """Ridge regression from hidden states `[N, d]` to embeddings `[N, d]`; the share of their variance that is left."""
        x, y = hidden.double(), embeddings.double()
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        gram = x.T @ x
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram, x.T @ y).T
        self.weight.copy_(weight)
        self.bias.copy_(means[1] - weight @ means[0])
        return float((y - x @ weight.T).pow(2).sum() / y.pow(2).sum())


@torch.no_grad()
def states_and_embeddings(backbone: PreTrainedModel, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token of texts `[B, T]`: the decoder's final hidden state, and the embedding of what the head says there, `[B·T, d]`."""
    embed, head, hidden, said = backbone.get_input_embeddings(), backbone.get_output_embeddings(), [], []
    for ids in texts.split(8):
        states = backbone.base_model(inputs_embeds=embed(ids), use_cache=False).last_hidden_state
        hidden.append(states.flatten(0, 1))
        said.append(embed(head(hidden[-1]).argmax(-1)))
    return torch.cat(hidden), torch.cat(said)
