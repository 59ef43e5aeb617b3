"""Five models whose circuits are known, each drawn by a seed that no method is told.

    delay        the symbol k tokens ago, through the conv taps of two layers; nothing in the state
    accumulator  h sums what ticks write; the answer is linear in the sum
    latch        only a set token opens dt; it forgets and overwrites, all later tokens leave the state; a query reads
    recall       key value pairs: the conv brings the key to its value, B from the key, u from the value; C from a query
    two          two sums in separate channels and dimensions of one layer; the query token says which is read

`plant(name, seed)` gives one. The base and donor prompts differ where it matters, and also where it does not.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from interp.run import Metric
from minimal_mamba.errors import InputError, nearest

from .build import Bench
from .truth import Planted, Terms, delay_truth, previous, read_out, state_truth

LENGTH, ROWS = 12, 4
UNIT = 0.1  # what is written for 1: small beside the distractors, so that size says nothing
RATES = (0.05, 0.07, 0.1)


def table(values: dict[int, float]) -> Tensor:
    """values[token], else 0; entry -1 is no token."""
    out = torch.zeros(13, dtype=torch.float64)
    for token, value in values.items():
        out[token] = value
    return out


def _accumulate(seed: int) -> Planted:
    bench = Bench(seed)
    one, two, *rests = bench.tokens[:6]
    yes, no = bench.tokens[6:8]
    rate = RATES[int(bench.integers(3))]
    layer, values = bench.layer, {one: 1.0, two: 2.0}
    e, always = bench.channel(layer, values, rate=rate, to=bench.out[0]), bench.channel(layer, 1.0)
    n = bench.dimension(layer)
    bench.connect(layer, n, B={always: UNIT}, C={always: 1 / UNIT})
    bench.finish({yes: bench.out[0], no: bench.out[1]})
    kinds = torch.tensor([one, two, *rests])
    ids = kinds[bench.integers(len(kinds), ROWS, LENGTH)]
    ids[:, -1] = rests[0]
    more, same, again = bench.draw(LENGTH - 2)[:3]
    donor = ids.clone()
    ids[:, more], donor[:, more] = rests[1], two
    ids[:, same], donor[:, same] = rests[2], rests[3]  # differs, and means the same
    ids[:, again], donor[:, again] = one, two
    value, keep = table(values), math.exp(-rate)

    def terms(cur: Tensor, prev: Tensor) -> Terms:
        u = value[cur][..., None]
        one = torch.ones_like(u)
        return Terms(keep * one, one, UNIT * one, u, one / UNIT)

    return _planted(
        "accumulator", seed, bench, ids, donor, terms, [(e, n)], math.log(2) / rate, {e: "sum", always: "B and C"},
        (yes, no), kinds,
    )  # fmt: skip


def _latch(seed: int) -> Planted:
    bench = Bench(seed)
    low, high, clear, query, *fillers = bench.tokens[:8]
    yes, no = bench.tokens[8:10]
    layer = bench.layer
    values = {low: 1.0, high: 2.0, fillers[0]: 1.5, fillers[1]: 0.5}  # fillers knock too, at a closed door
    sets = {low: 1.0, high: 1.0, clear: 1.0}
    e, always = bench.channel(layer, values, dt=None, to=bench.out[0]), bench.channel(layer, 1.0)
    door, asked = bench.channel(layer, sets), bench.channel(layer, {query: 1.0})
    n, wide = bench.dimension(layer), 40.0
    bench.connect(layer, n, B={always: UNIT / wide}, C={asked: 1 / UNIT})
    with torch.no_grad():
        mixer = bench.model.backbone.layers[layer].mixer
        mixer.x_proj.weight[0] = 0
        mixer.x_proj.weight[0, door] = 1.0
        mixer.dt_proj.weight[e, 0] = 2 * wide  # dt is softplus(-40) or softplus(40)
    bench.finish({yes: bench.out[0], no: bench.out[1]})
    kinds = torch.tensor([low, high, clear, *fillers])
    noise = torch.tensor(fillers)
    ids = kinds[bench.integers(len(kinds), ROWS, LENGTH)]
    last = 4 + int(bench.integers(LENGTH - 7))  # the last token that sets
    ids[:, last + 1 :] = noise[bench.integers(len(fillers), ROWS, LENGTH - last - 1)]
    ids[:, -1] = query
    donor = ids.clone()
    final = torch.tensor([high, clear] * (ROWS // 2))
    if seed % 2:  # the donor sets where the base's door stays shut
        ids[:, 2:last] = donor[:, 2:last] = noise[bench.integers(len(fillers), ROWS, last - 2)]
        ids[:, 0], donor[:, 0], ids[:, 1], donor[:, 1] = high, low, low, low  # the first is overwritten
        ids[:, last], donor[:, last] = fillers[2], final
    else:
        ids[:, 1], donor[:, 1] = high, low  # overwritten in all rows
        ids[:, last], donor[:, last] = low, final
    ids[:, last + 1], donor[:, last + 1] = fillers[0], fillers[1]
    opens, value, asks = table(sets), table(values), table({query: 1 / UNIT})

    def terms(cur: Tensor, prev: Tensor) -> Terms:
        is_open, u = opens[cur][..., None], value[cur][..., None]
        return Terms(1 - is_open, wide * is_open, UNIT / wide * torch.ones_like(u), u, asks[cur][..., None])

    roles = {e: "value", always: "B", door: "dt", asked: "C"}
    return _planted(
        "latch", seed, bench, ids, donor, terms, [(e, n)], math.inf, roles,
        (yes, no), kinds, query,
    )  # fmt: skip


def _recall(seed: int) -> Planted:
    bench = Bench(seed)
    keys, values, fillers = bench.tokens[:3], bench.tokens[3:6], bench.tokens[6:9]
    layer, rate = bench.layer, RATES[0]
    e = [bench.channel(layer, {v: 1.0}, rate=rate, to=bench.out[j]) for j, v in enumerate(values)]
    bound = [bench.channel(layer, {k: 1.0}, tap=1) for k in keys]  # the key, one token later
    asked = [bench.channel(layer, {k: 1.0}) for k in keys]
    n = [bench.dimension(layer) for _ in keys]
    for i in range(3):
        bench.connect(layer, n[i], B={bound[i]: UNIT}, C={asked[i]: 1 / UNIT})
    model = bench.finish({v: bench.out[j] for j, v in enumerate(values)})
    gaps = sorted(bench.draw(8)[:3])  # three pairs in positions 0..10, the query at 11
    starts = [g + i for i, g in enumerate(gaps)]

    def prompts(order: Tensor, given: Tensor, query: Tensor, noise: Tensor) -> Tensor:
        ids = torch.tensor(fillers)[noise]
        for i, p in enumerate(starts):
            ids[:, p], ids[:, p + 1] = torch.tensor(keys)[order[:, i]], torch.tensor(values)[given[:, i]]
        ids[:, -1] = torch.tensor(keys)[query]
        return ids

    def orders(rows: int) -> Tensor:
        return torch.tensor([bench.draw(3) for _ in range(rows)])

    order, given, noise = orders(ROWS), orders(ROWS), bench.integers(3, ROWS, LENGTH)
    asks = int(bench.integers(3))  # the pair that is asked for, as they come
    query = order[:, asks]
    other_noise = bench.integers(3, ROWS, LENGTH)
    ids = prompts(order, given, query, noise)
    if seed % 2:  # the donor has another key there: two keys have changed places
        swapped = order.clone()
        swapped[:, [asks, (asks + 1) % 3]] = order[:, [(asks + 1) % 3, asks]]
        donor = prompts(swapped, given, query, other_noise)
        wanted = given[:, (asks + 1) % 3]
    else:  # another value there, and at a pair that is not asked for
        donor = prompts(order, given.roll(1, 1), query, other_noise)
        wanted = given.roll(1, 1)[:, asks]
    answer, foil = torch.tensor(values)[wanted], torch.tensor(values)[given[:, asks]]
    coordinates = [(j, i) for j in range(3) for i in range(3)]
    is_value = torch.stack([table({values[j]: 1.0}) for j, _ in coordinates], 1)  # (v, c)
    is_key = torch.stack([table({keys[i]: 1.0}) for _, i in coordinates], 1)
    value_of = torch.tensor([values[j] for j, _ in coordinates])
    sign = (value_of == answer[:, None]).double() - (value_of == foil[:, None]).double()  # (b, c)

    def terms(cur: Tensor, prev: Tensor) -> Terms:
        u, signs = is_value[cur], sign[torch.arange(len(cur)) % ROWS][:, None]
        one = torch.ones_like(u)
        return Terms(math.exp(-rate) * one, one, UNIT * is_key[prev], u, is_key[cur] / UNIT * signs)

    def sample(rows: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        perms = torch.stack([torch.randperm(3, generator=rng) for _ in range(2 * rows)])
        chosen = torch.randint(3, (rows,), generator=rng)
        return prompts(perms[:rows], perms[rows:], chosen, torch.randint(3, (rows, LENGTH), generator=rng))

    roles = dict.fromkeys(e, "value") | dict.fromkeys(bound, "B, by the conv") | dict.fromkeys(asked, "C")
    truth = state_truth(
        ids, donor, terms, layer=layer, n_layer=model.config.n_layer,
        coordinates=[(e[j], n[i]) for j, i in coordinates], half_life=math.log(2) / rate,
        channels={(layer, c): r for c, r in roles.items()}, binding=True,
    )  # fmt: skip

    def bound_value(x: Tensor) -> Tensor:
        rows, at = torch.arange(len(x)), (x[:, :-1] == x[:, -1:]).double().argmax(1)
        return x[rows, at + 1]

    return Planted(
        "recall", seed, model, ids, donor, _difference(answer, foil), (answer, foil),
        lambda x: read_out(terms(x, previous(x))), sample, bound_value, truth,
    )  # fmt: skip


def _two(seed: int) -> Planted:
    bench = Bench(seed)
    ticks, queries, rests = bench.tokens[:2], bench.tokens[2:4], bench.tokens[4:7]
    yes, no = bench.tokens[7:9]
    layer, asks, rate = bench.layer, int(bench.integers(2)), RATES[0]
    e = [bench.channel(layer, {t: 1.0}, rate=rate, to=bench.out[0]) for t in ticks]
    asked = [bench.channel(layer, {q: 1.0}) for q in queries]
    n = [bench.dimension(layer) for _ in ticks]
    for i in range(2):
        bench.connect(layer, n[i], B={e[i]: UNIT}, C={asked[i]: 1 / UNIT})
    bench.finish({yes: bench.out[0], no: bench.out[1]})
    kinds = torch.tensor([*ticks, *rests])
    ids = kinds[bench.integers(len(kinds), ROWS, LENGTH)]
    ids[:, -1] = queries[asks]
    donor = ids.clone()
    first, second, third = bench.draw(LENGTH - 2)[:3]
    for p, tick in ((first, ticks[asks]), (second, ticks[1 - asks]), (third, ticks[1 - asks])):
        ids[:, p], donor[:, p] = rests[0], tick
    is_tick = torch.stack([table({t: 1.0}) for t in ticks], 1)
    reads = torch.stack([table({q: 1 / UNIT}) for q in queries], 1)

    def terms(cur: Tensor, prev: Tensor) -> Terms:
        u = is_tick[cur]
        one = torch.ones_like(u)
        return Terms(math.exp(-rate) * one, one, UNIT * u, u, reads[cur])

    roles = {e[asks]: "sum", e[1 - asks]: "other sum", asked[asks]: "C", asked[1 - asks]: "other C"}
    return _planted(
        "two", seed, bench, ids, donor, terms, list(zip(e, n, strict=True)), math.log(2) / rate, roles,
        (yes, no), kinds, queries[asks],
    )  # fmt: skip


def _delay(seed: int) -> Planted:
    bench = Bench(seed)
    symbols, rests = bench.tokens[:4], bench.tokens[4:8]
    layers = sorted(bench.draw(3)[:2])
    taps = (1 + bench.integers(3, 2)).tolist()
    roles: dict[tuple[int, int], str] = {}
    for i, token in enumerate(symbols):
        a = bench.channel(layers[0], {token: 1.0}, tap=taps[0], dt=None, skip=1.0, to=bench.mid[i])
        b = bench.channel(layers[1], {}, tap=taps[1], dt=None, skip=1.0, to=bench.out[i])
        with torch.no_grad():  # the second hop reads what the first one wrote
            c = bench.model.backbone.layers[layers[0]].mixer.in_proj.weight[a].max()
            bench.model.backbone.layers[layers[1]].mixer.in_proj.weight[b, bench.mid[i]] = c
        roles |= {(layers[0], a): "first hop", (layers[1], b): "second hop"}
    model = bench.finish({token: bench.out[i] for i, token in enumerate(symbols)})
    source = LENGTH - 1 - sum(taps)
    kinds = torch.tensor([*symbols, *rests])
    ids, donor = kinds[bench.integers(8, ROWS, LENGTH)], kinds[bench.integers(8, ROWS, LENGTH)]
    donor[:, -1] = ids[:, -1]
    which = torch.tensor(symbols)
    ids[:, source], donor[:, source] = which, which.roll(1)
    answer, foil = which.roll(1), which

    def closed(x: Tensor) -> Tensor:
        rows = torch.arange(len(x)) % ROWS
        return (x[:, source] == answer[rows]).double() - (x[:, source] == foil[rows]).double()

    truth = delay_truth(ids, donor, list(zip(layers, taps, strict=True)), closed, model.config.n_layer, roles)

    def symbol(x: Tensor) -> Tensor:
        return torch.where(torch.isin(x[:, source], which), x[:, source], -1)

    return Planted(
        "delay", seed, model, ids, donor, _difference(answer, foil), (answer, foil), closed, _sampler(kinds, None),
        symbol, truth,
    )  # fmt: skip


def _planted(
    name: str, seed: int, bench: Bench, ids: Tensor, donor: Tensor, terms: Callable[[Tensor, Tensor], Terms],
    coordinates: list[tuple[int, int]], half_life: float, roles: dict[int, str], tokens: tuple[int, int],
    kinds: Tensor, query: int | None = None,
) -> Planted:  # fmt: skip
    channels = {(bench.layer, e): role for e, role in roles.items()}
    truth = state_truth(
        ids, donor, terms, layer=bench.layer, n_layer=bench.model.config.n_layer, coordinates=coordinates,
        half_life=half_life, channels=channels,
    )  # fmt: skip
    answer, foil = (torch.full((ROWS,), token) for token in tokens)

    def closed(x: Tensor) -> Tensor:
        return read_out(terms(x, previous(x)))

    return Planted(
        name, seed, bench.model, ids, donor, _difference(answer, foil), (answer, foil), closed, _sampler(kinds, query),
        closed, truth,
    )  # fmt: skip


def _difference(answer: Tensor, foil: Tensor) -> Metric:
    """logit(answer) - logit(foil) at the last position; the rows of a larger batch take turns."""

    def metric(logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return logits[rows, -1, answer[rows % ROWS]] - logits[rows, -1, foil[rows % ROWS]]

    return metric


def _sampler(kinds: Tensor, query: int | None) -> Callable[[int, int], Tensor]:
    def sample(rows: int, seed: int) -> Tensor:
        ids = kinds[torch.randint(len(kinds), (rows, LENGTH), generator=torch.Generator().manual_seed(seed))]
        if query is not None:
            ids[:, -1] = query
        return ids

    return sample


MODELS: dict[str, Callable[[int], Planted]] = {
    "delay": _delay, "accumulator": _accumulate, "latch": _latch, "recall": _recall, "two": _two,
}  # fmt: skip


def plant(name: str, seed: int = 0) -> Planted:
    """The planted model of this name that this seed draws.

    Raises:
        InputError: there is none of this name.
    """
    if name not in MODELS:
        raise InputError(f"no planted model {name!r}.{nearest(name, MODELS)} There are: {', '.join(MODELS)}.")
    return MODELS[name](seed)
