"""Models whose inputs are nests or whose results are objects, and two tasks for each."""

from __future__ import annotations

import dataclasses
import importlib

import torch
from torch.nn.functional import cross_entropy

IGNORED = 255


@dataclasses.dataclass
class Output:
    """What transformers return: an object with logits, and more."""

    logits: torch.Tensor
    hidden: torch.Tensor


class Transformer(torch.nn.Module):
    """A dict of tokens and a padding mask in, an object out."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = torch.nn.Embedding(12, 16), torch.nn.Parameter(torch.randn(7, 16) / 4)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask):
        hidden = self.layer(self.embed(input_ids) + self.position, src_key_padding_mask=attention_mask == 0)
        kept = attention_mask[..., None].float()
        return Output(self.head((hidden * kept).sum(1) / kept.sum(1)), hidden)


class TwoInputs(torch.nn.Module):
    """Two inputs by position, a tuple of one tensor out."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = torch.nn.Linear(6, 16), torch.nn.Linear(3, 16), torch.nn.Linear(16, 4)

    def forward(self, left, right):
        return (self.head(torch.tanh(self.left(left) + self.right(right))),)


class MultiHead(torch.nn.Module):
    """A number for each sample chooses its head; a dict out."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = torch.nn.Linear(6, 16), torch.nn.Linear(16, 8)

    def forward(self, x, task):
        heads = self.heads(torch.tanh(self.body(x))).unflatten(1, (2, 4))
        return {"logits": heads[torch.arange(len(x)), task], "all": heads}


class Segmenter(torch.nn.Module):
    """Images in, classes of pixels out."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(12, 4, 1))

    def forward(self, x):
        return self.layers(x)


def bert():
    """A transformer of the transformers library, of its own config."""
    library = importlib.import_module("transformers")
    config = library.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=4,
        max_position_embeddings=8, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return library.BertForSequenceClassification(config)


def tokens(task, n, g):
    """Sequences of 3 to 7 tokens; the class is which of the task's two marks stands in them."""
    ids, y = torch.randint(4, 12, (n, 7), generator=g), torch.randint(0, 2, (n,), generator=g) + 2 * task
    lengths = torch.randint(3, 8, (n, 1), generator=g)
    ids[:, 1] = y
    mask = (torch.arange(7) < lengths).long()
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}, y


def two_inputs(task, n, g):
    left, right = torch.randn(n, 6, generator=g), torch.randn(n, 3, generator=g)
    left[:, 5] = 2 * task - 1  # tells the tasks apart
    return (left, right), (left[:, 0] + right[:, 1] > 0).long() + 2 * task


def heads(task, n, g):
    """Each head is about another feature; later, about other classes of it."""
    x, head = torch.randn(n, 6, generator=g), torch.randint(0, 2, (n,), generator=g)
    x[:, 5] = task - 0.5
    return {"x": x, "task": head}, (x[torch.arange(n), head] > 0).long() + 2 * task


def segments(task, n, g):
    """The brighter channel is the class of a pixel; a border is ignored. The third channel tells the tasks apart."""
    x = torch.randn(n, 3, 5, 5, generator=g)
    y = x[:, :2].argmax(1) + 2 * task
    x[:, 2] = 2 * task - 1
    y[:, 0] = IGNORED
    return x, y


# How to make a model, a batch of (task, n, generator), and Adam's rate.
KINDS = {
    "transformer": (Transformer, tokens, 0.02),
    "transformers": (bert, tokens, 0.01),
    "two inputs": (TwoInputs, two_inputs, 0.02),
    "multi-head": (MultiHead, heads, 0.02),
    "segmentation": (Segmenter, segments, 0.02),
}


def model_of(kind):
    torch.manual_seed(0)
    return KINDS[kind][0]()


def batches(kind, task, n=40, size=16):
    g = torch.Generator().manual_seed(task)
    return [KINDS[kind][1](task, size, g) for _ in range(n)]


def loss_fn(outputs, y):
    return cross_entropy(outputs, y, ignore_index=IGNORED)
