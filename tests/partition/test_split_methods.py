"""Every classic method against its constraints, and against slow and literal versions of what the papers do."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks import settings
from tasks.partition import assignment, methods
from tasks.partition.index import misplaced
from tasks.partition.layer import Layer, Sizes
from tasks.partition.methods import clustering, coactivation, copy, importance, token_clusters

KINDS = {
    "random": {},
    "clustering": {"rows": ["gate", "up", "down"], "metric": "cosine"},
    "coactivation": {},
    "importance": {},
    "inner": {"method": "importance", "sharing": "inner"},
    "inter": {"method": "importance", "sharing": "inter"},
    "moebert": {},
    "copy": {},
    "token_clusters": {},
}


def options_of(kind, *, experts=4, top_k=2, shared_experts=0, seed=0, **more):
    shared = max(shared_experts, 1) if kind == "inter" else shared_experts if kind == "token_clusters" else 0
    fields = {"method": kind, "experts": experts, "top_k": top_k, "shared_experts": shared, "seed": seed}
    return settings.Partition(**(fields | KINDS[kind] | more))


def layer_of(width, *, clusters=4, number=0, seed=0, hidden=12, tokens=64):
    random = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(width, hidden, generator=random) for _ in range(3))
    return Layer(
        number=number,
        gate_ND=gate,
        up_ND=up,
        down_DN=down.T.contiguous(),
        x_TD=torch.randn(tokens, hidden, generator=random),
        importance_CN=torch.randint(0, 6, (clusters, width), generator=random).float(),  # with ties
    )


def made(options, width, **layer):
    layer = layer_of(width, clusters=options.experts, **layer)
    return methods.get(options.method).split(layer, Sizes.of(options, width), options)


@given(st.data())
@hypothesis_settings(max_examples=80, deadline=None)
def test_every_method_gives_the_same_int32_indices_again_and_they_keep_its_constraints(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    experts, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    shared = data.draw(st.integers(1, 3)) if kind in {"inter", "token_clusters"} else 0
    width, more = size * (experts + shared), {}
    if kind == "token_clusters":
        more["expert_size"] = data.draw(st.integers(1, width // (shared + 1)))
    if kind == "inner":
        more["expert_size"] = data.draw(st.integers(1, width))
    if kind == "moebert":
        width += data.draw(st.integers(0, 5))
        common = data.draw(st.integers(0, width - experts))
        more["common_neurons"] = common
        more["expert_size"] = data.draw(st.integers(common + 1, common + (width - common) // experts))
    if kind == "copy":
        slices = data.draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
        width, more["expert_size"] = size * slices, size
        more["top_k"] = slices
    options = options_of(kind, experts=experts, shared_experts=shared, **({"top_k": 1} | more))
    sizes, index = Sizes.of(options, width), made(options, width)
    assert index.dtype == np.int32
    assert index.shape == (sizes.shared + sizes.experts, sizes.size)
    assert misplaced(index, sizes=sizes, options=options) == []
    assert index.tobytes() == made(options, width).tobytes()


@pytest.mark.parametrize("kind", ["random", "clustering", "coactivation"])
def test_another_seed_and_another_layer_give_other_experts(kind):
    base = made(options_of(kind), 64)
    assert not np.array_equal(base, made(options_of(kind, seed=1), 64))
    assert not np.array_equal(base, made(options_of(kind), 64, number=1))


def test_the_needs_of_every_method_are_known():
    needs = {name: methods.get(name).needs for name in methods.NAMES if name != "activation"}
    assert needs == {
        "random": "nothing",
        "clustering": "weights",
        "coactivation": "activations",
        "importance": "gradients",
        "moebert": "gradients",
        "copy": "nothing",
        "token_clusters": "activations",
    }


def test_random_experts_are_those_of_every_earlier_conversion_with_the_same_seed():
    expected = np.random.default_rng([7, 3]).permutation(24).astype(np.int32).reshape(4, 6)
    np.testing.assert_array_equal(made(options_of("random", seed=7), 24, number=3), np.sort(expected, axis=1))


# The constraints


BROKEN = {
    "a neuron twice in one expert": (
        "random",
        lambda i: i.__setitem__((0, 0), i[0, 1]),
        r"has experts with a neuron twice: \[\d+\]",
    ),
    "a neuron lost": ("random", lambda i: i.__setitem__((0, 0), i[1, 0]), "not there exactly once"),
    "one out of range": ("random", lambda i: i.__setitem__((0, 0), 16), "allowed: whole numbers, 0 to 15"),
    "a copy incomplete": ("copy", lambda i: i.__setitem__((0, 0), i[1, 0]), "not there exactly 2 times"),
    "common neurons missing": ("moebert", lambda i: i.__setitem__((0, 0), 15), "has 1 neurons in all 4 experts"),
    "others dealt twice": ("moebert", lambda i: i.__setitem__((0, 2), i[1, 2]), "neither one nor all"),
    "a shared neuron routed too": (
        "token_clusters",
        lambda i: i.__setitem__((1, 0), i[0, 0]),
        "has neurons in shared experts and in others",
    ),
    "an expert's neuron twice": ("inner", lambda i: i.__setitem__((0, 0), i[0, 1]), "has experts with a neuron twice"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_breaks_a_constraint_is_named(fault):
    kind, breaks, message = BROKEN[fault]
    more = {
        "moebert": {"common_neurons": 2, "expert_size": 5},
        "copy": {"expert_size": 8},
        "token_clusters": {"shared_experts": 1, "expert_size": 4, "top_k": 1},
    }.get(kind, {})
    options = options_of(kind, **more)
    sizes, index = Sizes.of(options, 16), np.array(made(options, 16))
    if kind == "moebert":
        assert 15 not in index[:, :2]
    breaks(index)
    problems = misplaced(index, sizes=sizes, options=options)
    assert any(re.search(message, text) for text in problems)


# Token clusters


def test_each_expert_takes_the_neurons_that_a_cluster_of_tokens_uses_and_the_shared_one_those_that_all_use():
    # Inputs of three kinds, each of which switches on 4 neurons of its own; 4 more are always on.
    random = np.random.default_rng(0)
    kind_T = random.integers(0, 3, 600)
    x_TD = 0.05 * random.standard_normal((600, 8)) + np.eye(8)[kind_T] + 2 * np.eye(8)[7]
    gate_ND = 4 * np.concatenate([np.eye(8)[np.repeat(np.arange(3), 4)] - np.eye(8)[7] / 4, np.eye(8)[[7] * 4] * 4])
    neurons = random.permutation(16)
    layer = Layer(
        number=0,
        gate_ND=torch.from_numpy(gate_ND[neurons]).float(),
        up_ND=torch.from_numpy(np.tile(np.eye(8)[7], (16, 1))).float(),
        down_DN=torch.from_numpy(random.standard_normal((8, 16))).float(),
        x_TD=torch.from_numpy(x_TD).float(),
    )
    options = options_of("token_clusters", experts=3, top_k=1, shared_experts=1, expert_size=4)
    index = token_clusters.split(layer, Sizes.of(options, 16), options)
    group_N = np.repeat(np.arange(4), 4)[neurons]
    assert group_N[index[0]].tolist() == [3] * 4
    assert sorted(group_N[row].tolist() for row in index[1:]) == [[kind] * 4 for kind in range(3)]


def test_token_clusters_refuse_more_than_one_expert_a_token_and_experts_wider_than_the_ffn():
    with pytest.raises(ValidationError, match="a token passes one; set top_k: 1"):
        options_of("token_clusters", top_k=2, expert_size=4)
    with pytest.raises(ValueError, match="takes 1 to 8, an intermediate_size of 16 over 1 \\+ 1"):
        options_of("token_clusters", top_k=1, shared_experts=1, expert_size=9).check_width(16)


# Clustering


def planted_rows(experts, size, hidden, *, seed=0):
    """Rows around `experts` directions, of very different lengths, shuffled; and which direction each has."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.repeat(np.arange(experts), size))
    centres = np.linalg.qr(random.standard_normal((hidden, hidden)))[0][:experts]
    rows = centres[group] + 0.1 * random.standard_normal((len(group), hidden))
    return torch.from_numpy(rows.astype(np.float32)), group


def same_groups(one_N, two_N):
    return len(set(zip(one_N.tolist(), two_N.tolist(), strict=True))) == len(set(one_N.tolist()))


def group_of(index_EF):
    expert_N = np.empty(index_EF.size, dtype=int)
    expert_N[index_EF] = np.arange(len(index_EF))[:, None]
    return expert_N


@pytest.mark.parametrize("rows", ["gate", "up", "down"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_clustering_finds_the_groups_of_the_matrix_it_is_told_to_look_at(rows, metric):
    planted, group = planted_rows(4, 8, 12)
    layer = layer_of(32)
    weight = {"gate": {"gate_ND": planted}, "up": {"up_ND": planted}, "down": {"down_DN": planted.T}}[rows]
    options = options_of("clustering", rows=[rows], metric=metric)
    index = clustering.split(dataclasses.replace(layer, **weight), Sizes.of(options, 32), options)
    assert same_groups(group_of(index), group)


def test_l2_goes_by_length_where_cosine_goes_by_direction():
    random = np.random.default_rng(0)
    directions = 0.2 * np.eye(2, 12)[np.repeat([0, 1], 8)]
    lengths = np.tile([0.1, 5.0], 8)[:, None]
    up = torch.from_numpy(lengths * (directions + 2 * np.eye(1, 12, 3)) + 0.001 * random.random((16, 12))).float()
    layer = dataclasses.replace(layer_of(16), up_ND=up)
    groups = {}
    for metric in ("l2", "cosine"):
        options = options_of("clustering", experts=2, rows=["up"], metric=metric)
        groups[metric] = group_of(clustering.split(layer, Sizes.of(options, 16), options))
    assert same_groups(groups["cosine"], np.repeat([0, 1], 8))
    assert same_groups(groups["l2"], np.tile([0, 1], 8))


def test_a_matrix_with_large_entries_does_not_dominate_the_others():
    layer = layer_of(32)
    options = options_of("clustering", rows=["gate", "up"], metric="l2")
    larger = dataclasses.replace(layer, gate_ND=layer.gate_ND * 1024)
    sizes = Sizes.of(options, 32)
    np.testing.assert_array_equal(clustering.split(layer, sizes, options), clustering.split(larger, sizes, options))


@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 99))
@hypothesis_settings(max_examples=60, deadline=None)
def test_balanced_k_means_ends_where_no_assignment_to_its_own_centres_is_better(groups, size, cosine, seed):
    random = np.random.default_rng(seed)
    rows = random.integers(-2, 3, (groups * size + groups // 2, 4)).astype(np.float64)  # with duplicates and zeros
    sizes = np.full(groups, size)
    sizes[: groups // 2] += 1
    assigned = assignment.kmeans(rows, sizes_G=sizes, generator=np.random.default_rng(seed), cosine=cosine)
    np.testing.assert_array_equal(np.bincount(assigned, minlength=groups), sizes)
    if cosine:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    centres = np.stack([rows[assigned == group].mean(0) for group in range(groups)])
    if cosine:
        centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-300)
    cost = -(rows @ centres.T) if cosine else np.square(rows[:, None] - centres).sum(2)
    best = assignment.balanced(cost, sizes_G=sizes)
    everyone = np.arange(len(rows))
    assert cost[everyone, assigned].sum() <= cost[everyone, best].sum() + 1e-9


# Co-activation


def cut_weight(weight, part):
    return weight[part[:, None] != part].sum() / 2


def planted_graph(parts, size, *, inside, noise, seed):
    random = np.random.default_rng(seed)
    part = random.permutation(np.repeat(np.arange(parts), size))
    weight = 1 + inside * (part[:, None] == part) + noise * random.random((len(part), len(part)))
    degree = random.uniform(0.3, 3, len(part))
    weight = np.triu(weight * degree[:, None] * degree, 1)
    return (weight + weight.T).astype(np.float32), part


@pytest.mark.parametrize("parts", [2, 5, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_partition_of_the_graph_is_found(parts, seed):
    weight, part = planted_graph(parts, 24, inside=1.0, noise=1.0, seed=seed)
    assert same_groups(coactivation.cut(weight, parts=parts, generator=np.random.default_rng(seed)), part)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_swap_of_two_nodes_lowers_the_cut_and_it_is_below_every_random_one(seed):
    random = np.random.default_rng(seed)
    h = np.abs(random.standard_normal((64, 4)) @ random.standard_normal((4, 48))).astype(np.float32)
    weight = h.T @ h
    np.fill_diagonal(weight, 0)
    assigned = coactivation.cut(weight, parts=4, generator=np.random.default_rng(seed))
    least = cut_weight(weight, assigned)
    for i in range(48):
        for j in range(i):
            swapped = assigned.copy()
            swapped[[i, j]] = assigned[[j, i]]
            assert cut_weight(weight, swapped) >= least * (1 - 1e-5)
    chance = [cut_weight(weight, random.permutation(assigned)) for _ in range(200)]
    assert least < np.mean(chance) - 4 * np.std(chance)
    assert least < min(chance)


def test_the_graph_is_the_product_of_absolute_activations_over_all_chunks(monkeypatch):
    layer = layer_of(20, tokens=100)
    monkeypatch.setattr("tasks.partition.layer.CHUNK", 33)
    x = layer.x_TD.double()
    h = (torch.nn.functional.silu(x @ layer.gate_ND.double().T) * (x @ layer.up_ND.double().T)).abs()
    expected = (h.T @ h).fill_diagonal_(0)
    np.testing.assert_allclose(coactivation.graph(layer), expected.numpy(), rtol=1e-4)


def test_neurons_that_fire_together_become_an_expert():
    """Four kinds of tokens, each of which drives its own eight neurons."""
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 8))
    eye = torch.eye(4)
    layer = Layer(
        number=0,
        gate_ND=eye[group] * 4,
        up_ND=eye[group],
        down_DN=torch.randn(4, 32, generator=torch.Generator().manual_seed(0)),
        x_TD=eye[torch.arange(80) % 4],
    )
    options = options_of("coactivation")
    assert same_groups(group_of(coactivation.split(layer, Sizes.of(options, 32), options)), group)


# Importance


def literal_greedy(score, size):
    """One (expert, neuron) at a time, the highest score first; ties by expert, then neuron."""
    experts, neurons = score.shape
    owner, free = [-1] * neurons, [size] * experts
    for _, e, n in sorted((-score[e, n], e, n) for e in range(experts) for n in range(neurons)):
        if owner[n] < 0 and free[e]:
            owner[n] = e
            free[e] -= 1
    return owner


def literal_inter(score, *, shared, size):
    """The published procedure step by step, with the summed score where it goes by index."""
    experts, neurons = score.shape
    rankings = [sorted(range(neurons), key=lambda n: (-row[n], n)) for row in score]
    taken = []
    while len(taken) < shared * size:
        count = dict.fromkeys(range(neurons), 0)
        for ranking in rankings:
            for n in ranking[:size]:
                count[n] += 1
        most = max(count.values())
        chosen = sorted((n for n in count if count[n] == most), key=lambda n: (-score[:, n].sum(), n))
        chosen = chosen[: shared * size - len(taken)]
        taken += chosen
        rankings = [[n for n in ranking if n not in chosen] for ranking in rankings]
    rest = [n for n in range(neurons) if n not in taken]
    owner = literal_greedy(score[:, rest], size)
    routed = [[n for n, o in zip(rest, owner, strict=True) if o == e] for e in range(experts)]
    return [sorted(taken[s * size : (s + 1) * size]) for s in range(shared)] + routed


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 9), st.integers(0, 999))
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_greedy_matching_is_that_of_one_score_at_a_time(experts, size, levels, seed):
    score = np.random.default_rng(seed).integers(0, levels, (experts, experts * size)).astype(float)
    assert importance.greedy(score, size=size).tolist() == literal_greedy(score, size)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
@hypothesis_settings(max_examples=100, deadline=None)
def test_inter_sharing_is_the_published_procedure_with_ties_by_score(experts, shared, size, levels, seed):
    width = (experts + shared) * size
    score = np.random.default_rng(seed).integers(0, levels, (experts, width)).astype(np.float32)
    options = options_of("inter", experts=experts, shared_experts=shared, top_k=1)
    layer = dataclasses.replace(layer_of(width), importance_CN=torch.from_numpy(score))
    index = importance.split(layer, Sizes.of(options, width), options)
    assert index.tolist() == literal_inter(score.astype(float), shared=shared, size=size)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 6), st.integers(0, 999))
@hypothesis_settings(max_examples=50, deadline=None)
def test_inner_sharing_gives_every_expert_the_best_of_its_own_row(experts, size, levels, seed):
    score = np.random.default_rng(seed).integers(0, levels, (experts, 30)).astype(np.float32)
    options = options_of("inner", experts=experts, expert_size=size, top_k=1)
    layer = dataclasses.replace(layer_of(30), importance_CN=torch.from_numpy(score))
    index = importance.split(layer, Sizes.of(options, 30), options)
    assert index.tolist() == [sorted(sorted(range(30), key=lambda n: (-row[n], n))[:size]) for row in score]


@pytest.mark.parametrize("kind", ["importance", "moebert"])
def test_a_layer_without_importance_is_refused(kind):
    options = options_of(kind)
    layer = dataclasses.replace(layer_of(16, number=5), importance_CN=None)
    with pytest.raises(ValueError, match="layer 5: no importance"):
        methods.get(kind).split(layer, Sizes.of(options, 16), options)


def test_importance_needs_one_text_cluster_per_expert():
    options = options_of("importance")
    with pytest.raises(ValueError, match="importance on 3 text clusters for 4 experts"):
        importance.split(layer_of(16, clusters=3), Sizes.of(options, 16), options)


# MoEBERT


def moebert_ranks(width, *, experts, common, size):
    """The ranks that each expert holds, from a layer whose neuron n has the rank that a permutation gives it."""
    rank = np.random.default_rng(0).permutation(width)
    score = torch.from_numpy((width - rank).astype(np.float32))
    layer = dataclasses.replace(layer_of(width), importance_CN=torch.stack([0.25 * score, 0.75 * score]))
    options = options_of("moebert", experts=experts, common_neurons=common, expert_size=size, top_k=1)
    return rank[methods.get("moebert").split(layer, Sizes.of(options, width), options)]


@pytest.mark.parametrize(("width", "common", "size"), [(3072, 512, 768), (1536, 256, 384)])
def test_moebert_deals_the_published_ranks(width, common, size):
    ranks = moebert_ranks(width, experts=4, common=common, size=size)
    for e in range(4):
        assert ranks[e].tolist() == [*range(common), *range(common + e, width, 4)][:size]
    assert ranks.max() == width // 2 - 1
    assert ranks[:, -1].tolist() == list(range(width // 2 - 4, width // 2))


def test_moebert_with_one_expert_of_full_width_keeps_every_neuron():
    assert sorted(moebert_ranks(24, experts=1, common=0, size=24)[0]) == list(range(24))


# Copies


def test_a_copy_s_slices_stand_in_consecutive_experts_and_share_a_router_row():
    options = options_of("copy", experts=6, top_k=3, expert_size=4)
    index = made(options, 12)
    assert index.tolist() == [list(range(4 * g, 4 * g + 4)) for _ in range(2) for g in range(3)]
    assert copy.router_rows(6, slices=3).tolist() == [0, 0, 0, 1, 1, 1]


def weights(experts=4, size=50, hidden=40):
    random = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(experts, size, hidden, generator=random) * s + m for s, m in ((2.0, 0.5), (0.1, 0.0)))
    return gate, up, torch.randn(experts, hidden, size, generator=random)


def perturbed(**options):
    before = weights()
    after = copy.perturbed(*(w.clone() for w in before), options=options_of("copy", **options), layer=2)
    return before, after


def test_copies_stay_equal_without_noise_and_reinitialisation():
    assert all(torch.equal(a, b) for a, b in zip(*perturbed(), strict=True))


def test_noise_has_the_share_of_each_matrix_s_own_deviation_on_every_copy():
    for before, after in zip(*perturbed(noise=0.1), strict=True):
        noise = after - before
        for expert in range(4):
            assert noise[expert].std().item() == pytest.approx(0.1 * before.std().item(), rel=0.1)
            assert abs(noise[expert].mean().item()) < 0.02 * before.std().item()


def test_reinitialised_neurons_are_the_same_in_all_three_matrices_and_others_in_each_expert():
    before, after = perturbed(reinitialise=0.5)
    changed = [(a != b).any(dim).numpy() for a, b, dim in zip(before, after, (2, 2, 1), strict=True)]
    np.testing.assert_array_equal(changed[0], changed[1])
    np.testing.assert_array_equal(changed[0], changed[2])
    assert changed[0].sum(1).tolist() == [25] * 4
    assert len({row.tobytes() for row in changed[0]}) == 4
    for old, new, is_down in zip(before, after, (False, False, True), strict=True):
        drawn = (new.mT if is_down else new)[torch.from_numpy(changed[0])]
        assert drawn.std().item() == pytest.approx(old.std().item(), rel=0.05)
        assert drawn.mean().item() == pytest.approx(old.mean().item(), abs=0.06 * old.std().item())


def test_perturbation_depends_on_seed_and_layer_alone():
    base = perturbed(noise=0.1, reinitialise=0.2)[1]
    assert all(torch.equal(a, b) for a, b in zip(base, perturbed(noise=0.1, reinitialise=0.2)[1], strict=True))
    assert not torch.equal(base[0], perturbed(noise=0.1, reinitialise=0.2, seed=1)[1][0])
    other = copy.perturbed(*weights(), options=options_of("copy", noise=0.1, reinitialise=0.2), layer=3)
    assert not torch.equal(base[0], other[0])
