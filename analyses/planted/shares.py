"""Relevance on planted models: the base run's answer, shared out."""

import torch

from interp import at, relevance

from .scores import Found, compare
from .truth import Planted


def relevant_writes(p: Planted) -> Found:
    """`relevance` of what each position writes, twice: the other half of what is read is the gate's."""
    place = at.state_write()
    values = 2 * relevance(p.model, p.ids, p.metric, place).summed(place).movedim(1, -1)  # (layers, l, b)
    truth = torch.zeros_like(values)
    truth[p.truth.layer] = p.truth.contributions.T
    return compare(p, values, truth)


def relevant_words(p: Planted) -> Found:
    """`relevance` of each word, against what it moves to exchange it for the donor's: cells (position,)."""
    words = at.embed()
    values = relevance(p.model, p.ids, p.metric, words).summed(words)  # (b, l)
    return compare(p, values.T, p.truth.effects["resid_pre"][0])
