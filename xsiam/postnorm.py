"""Derivatives of BERT-like encoders by hand: less arithmetic than differentiating their forward.

BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ALBERT and ELECTRA share one block, with its norms behind
the residuals::

    y = x + Attention(x) Woᵀ,   z = Norm₁(y),   x' = Norm₂(z + act(z Upᵀ) Downᵀ)

Written out, its tangents cost less than a forward each:

* at the layer of the path a tangent touches ONE token, so queries, keys and values of all tangents
  are those of one text, and the attention logits change in one row and one column;
* after the last block a pooling reads a weighted sum over positions. Norm₂ is linear in a tangent,
  so the sum is taken BEFORE ``Down``, and positions that pooling does not read are never computed;
* where both are the same block, no tangent exists per position at all (:mod:`xsiam.one_token`);
* a norm's derivative is a projection, two thin matrix products instead of a chain of passes;
* logits of short texts take fewer products than queries and keys do (:mod:`xsiam.attention`).

The reverse direction uses the first two facts and the norm's transposed. :mod:`xsiam.jacobian`
differentiates any model's own forward and is the slow twin that tests hold this module to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor
from torch.func import jvp, vjp, vmap

from xsiam.attention import AttentionPoint
from xsiam.block import PostNormBlock
from xsiam.feed_forward import FeedForwardPoint
from xsiam.one_token import OneTokenBlock, is_cheaper

__all__ = ["Head", "PostNormBlock", "PostNormLinearisation"]

Head = Callable[[Tensor], Tensor]  # pooled vectors [m, D] -> embeddings [m, K]


class PostNormLinearisation:
    """A stack of blocks, a linear pooling and a head, linearised at points x [n, S, D].

    Args:
        blocks: The blocks from the layer of the path to the top, at least one.
        points: Where to linearise, [n, S, D].
        pooling: Weights of the positions, [n, S].
        head: From pooled vectors to embeddings.
    """

    def __init__(
        self, blocks: Sequence[PostNormBlock], points: Tensor, pooling: Tensor, head: Head | None
    ) -> None:
        read = (pooling != 0).any(0)
        rows = None if bool(read.all()) else read.nonzero()[:, 0]
        self.pooling = pooling if rows is None else pooling[:, rows]
        self.attentions: list[AttentionPoint] = []
        self.feed_forwards: list[FeedForwardPoint] = []
        hidden = points
        for number, block in enumerate(blocks, 1):
            needed = rows if number == len(blocks) else None
            attention = AttentionPoint(block, hidden, needed)
            feed_forward = FeedForwardPoint(block, attention.output, needed)
            hidden = feed_forward.output
            self.attentions.append(attention)
            self.feed_forwards.append(feed_forward)
        self.pooled = (pooling[:, None] @ hidden)[:, 0]
        self.head = head
        self._embedding = self.pooled if head is None else head(self.pooled)

    @property
    def embedding(self) -> Tensor:
        """The embeddings at the points, [n, K]."""
        return self._embedding

    def total(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and their derivatives along ``directions`` [n, S, D], each [n, K]."""
        pushed = self._push_rest(self.attentions[0].push(directions[:, :, None].contiguous()))
        return self.embedding, pushed[:, 0]

    def push_tokens(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Push the direction [n, S, D] of one token [T] at a time to [n, T, K]."""
        if self._is_factored:
            return self._through_head(self._only_block.push_tokens(directions, tokens))
        return self._push_rest(self.attentions[0].push_tokens(directions, tokens))

    def pull_tokens(self, cotangents: Tensor, directions: Tensor) -> Tensor:
        """Pull [n, C, K] back to tokens along ``directions`` [n, S, D]: [n, C, S]."""
        pulled = self._pull_to_first(cotangents)
        return self.attentions[0].pull_tokens(pulled, directions)

    def pull(self, cotangents: Tensor) -> Tensor:
        """Pull [n, C, K] back to hidden states, [n, C, S, D]."""
        return self.attentions[0].pull(self._pull_to_first(cotangents)).transpose(1, 2)

    @property
    def _is_factored(self) -> bool:
        """Whether tangents of one token run in factors: the same for every part of the tokens."""
        first, n_rows = self.attentions[0], self.pooling.shape[1]
        return len(self.attentions) == 1 and is_cheaper(first.block, n_rows, first.length)

    @cached_property
    def _only_block(self) -> OneTokenBlock:
        return OneTokenBlock(self.attentions[0], self.feed_forwards[0], self.pooling)

    def _push_rest(self, tangents: Tensor) -> Tensor:
        for attention, feed_forward in zip(self.attentions[1:], self.feed_forwards, strict=False):
            tangents = attention.push(feed_forward.push(tangents))
        pooled = self.feed_forwards[-1].push_pooled(tangents, self.pooling)
        return self._through_head(pooled)

    def _pull_to_first(self, cotangents: Tensor) -> Tensor:
        if self.head is not None:
            back = vjp(self.head, self.pooled)[1]
            cotangents = vmap(lambda c: back(c)[0], in_dims=1, out_dims=1)(cotangents)
        pulled = self.feed_forwards[-1].pull_pooled(cotangents, self.pooling)
        for attention, feed_forward in zip(
            self.attentions[:0:-1], self.feed_forwards[-2::-1], strict=True
        ):
            pulled = feed_forward.pull(attention.pull(pulled))
        return pulled

    def _through_head(self, tangents: Tensor) -> Tensor:
        if self.head is None:
            return tangents
        head, pooled = self.head, self.pooled
        pushed: Tensor = vmap(
            lambda tangent: jvp(head, (pooled,), (tangent,))[1], in_dims=1, out_dims=1
        )(tangents)
        return pushed
