"""What a runner knows of a model, and what of a sentence decides which lane it belongs in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from handler.decoding.constraints import CONSTRAINTS
from handler.decoding.sentence import Sentence


class Vocabulary(NamedTuple):
    """What every step asks of a model, which a scripted module would answer slowly.

    never: ids that no text has, on the model's device. shortlisted: whether the model has
    `allowed`, which says what each sentence may become. fused: whether it chooses tokens itself.
    """

    bos: int
    eos: int
    size: int
    never: Tensor
    shortlisted: bool
    fused: bool

    @classmethod
    def of(cls, model: Any, device: torch.device) -> "Vocabulary":
        never = torch.tensor([model.pad_id, model.unk_id, model.bos_id], device=device)
        shortlisted = bool(getattr(model, "shortlisted", False))
        fused = bool(getattr(model, "fused", False))
        return cls(model.bos_id, model.eos_id, model.target_vocabulary, never, shortlisted, fused)


class Kind(NamedTuple):
    """What the sentences of a lane have in common.

    width: K. plain: no option needs all logits, so the best few of each row are enough, and a model
    or a step that chooses them itself will do. attends: attention is read, where that takes a lane
    of its own.
    """

    width: int
    plain: bool
    attends: bool = False

    @classmethod
    def of(cls, sentence: Sentence) -> "Kind":
        o = sentence.options
        plain = not o.sampling and all(
            one.chosen or not one.asked(sentence) for one in CONSTRAINTS
        )
        return cls(o.beam_size, plain)
