"""MACs against a closed form that is written down here once more; parameters; bit operations."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import cost
from students.lightcap import LightCap, LightCapConfig, preset
from students.lightcap.concepts import windows

PRUNED = {
    "fusion.layers.0.query": (16, 32), "fusion.layers.0.key": (16, 32), "fusion.layers.0.value": (16, 32),
    "fusion.layers.0.output": (32, 16), "fusion.layers.1.up": (24, 32), "fusion.layers.1.down": (32, 24),
    "encoder.blocks.0.conv1": (40, 24, 3, 3), "encoder.blocks.0.bn1": (40,), "encoder.blocks.0.conv2": (48, 40, 3, 3),
}
CONFIGS = {
    "lightcap": preset("lightcap"),
    "minilm-student": preset("minilm-student"),
    "tiny": preset("tiny", vocabulary=100),
    "tiny, pruned": dataclasses.replace(preset("tiny", vocabulary=100), shapes=PRUNED),
    "tiny, concepts": dataclasses.replace(
        preset("tiny", vocabulary=100), concepts=6, alignment=(16, 8), concept_vocabulary=(9, 2), modulator=4
    ),
    "tiny, other encoder": preset("tiny", vocabulary=100, encoder="clip-rn50"),
}


@functools.cache
def macs_of(name: str, tokens: int = cost.TOKENS) -> cost.Macs:
    return cost.count_macs(CONFIGS[name], tokens)


def trunk(model: LightCap) -> int:
    """Sum over convolutions of weights per output channel x output pixels x output channels."""
    total = []

    def add(module, _, out):
        total.append(out.shape[2] * out.shape[3] * module.weight.numel())

    handles = [module.register_forward_hook(add) for module in model.encoder.modules() if isinstance(module, nn.Conv2d)]
    size = model.config.image_size
    model.encoder(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return sum(total)


def layer_sizes(config: LightCapConfig, index: int) -> tuple[int, int]:
    """(width of queries, keys and values; width of the feed-forward) of a layer, pruned or not."""
    width = config.shapes.get(f"fusion.layers.{index}.query", (config.hidden,))[0]
    return width, config.shapes.get(f"fusion.layers.{index}.up", (config.ffn,))[0]


def closed_form(config: LightCapConfig, tokens: int) -> dict[str, int]:
    hidden, grid = config.hidden, config.grid**2
    prefix_length = grid + config.concepts
    prefix, steps, attention, extraction, pooling = grid * config.channels * hidden, 0, 0, 0, 0
    if config.modulator:
        prefix += config.concepts * config.modulator * (hidden + config.channels)
    if config.alignment:
        inner, text = config.alignment
        looked_at = sum((config.grid - side + 1) ** 2 for side in (1, 3, 5) if side < config.grid) + 1
        known = config.concept_vocabulary[0] if config.concept_vocabulary else 0
        pooling = looked_at * grid * inner
        extraction = grid * config.channels * inner + pooling + looked_at * (inner * text + text * known)
    for index in range(config.layers):
        width, ffn = layer_sizes(config, index)
        last = index == config.layers - 1
        asked = 0 if last else prefix_length  # nothing reads the last layer's prefix
        prefix += 2 * prefix_length * hidden * width + asked * (2 * hidden * width + 2 * hidden * ffn)
        attention += 2 * width * asked * prefix_length
        for position in range(tokens):
            steps += 4 * hidden * width + 2 * hidden * ffn
            attention += 2 * width * (prefix_length + position + 1)
    steps += tokens * (config.heads * hidden * hidden + hidden * config.vocabulary)  # one vocabulary product for all heads
    return {"concepts": extraction, "prefix": prefix, "steps": steps, "attention": attention, "pooling": pooling}


@pytest.mark.parametrize(("name", "tokens"), [*((name, 12) for name in CONFIGS), ("tiny", 3)])
def test_counted_macs_are_the_closed_form(name, tokens):
    config = CONFIGS[name]
    counted = macs_of(name, tokens)
    with torch.device("meta"):
        encoder = trunk(LightCap(config).eval())
    wanted = closed_form(config, tokens)
    assert counted.encoder == encoder
    assert dataclasses.asdict(counted) == {"encoder": encoder} | wanted
    assert counted.caption == encoder + sum(wanted.values()) - wanted["pooling"]


def test_clip_s_trunk_and_the_whole_caption():
    macs = macs_of("lightcap")
    assert macs.encoder == 5_367_226_368
    assert 0.4e9 < macs.caption - macs.encoder < 0.8e9


@pytest.mark.parametrize("name", ["tiny", "tiny, pruned"])
def test_twelve_steps_dispatch_what_two_of_them_say(name):
    """Nothing is computed again, and attention sees one place more in each."""
    with torch.device("meta"):
        model = LightCap(CONFIGS[name]).eval()
        grid = torch.zeros(1, model.config.grid**2, model.config.channels)
        concepts = torch.ones(1, model.config.concepts, dtype=torch.long) if model.config.concepts else None

        def generate() -> None:
            past = model.prefill(grid, concepts)
            for position in range(12):
                _, past = model.step(torch.zeros(1, 1, dtype=torch.long), position, past)

        products, attention = cost.counted(generate)
    assert (products, attention) == (macs_of(name).prefix + macs_of(name).steps, macs_of(name).attention)


def test_torchs_counter_counts_the_same():
    config = CONFIGS["tiny, concepts"]
    with torch.device("meta"):
        model = LightCap(config).eval()
        pixels = torch.zeros(2, 3, config.image_size, config.image_size)
        concepts = torch.ones(2, config.concepts, dtype=torch.long)

        def work() -> None:
            grid = model.encode(pixels)
            cost.extract(model, grid)
            model.step(torch.zeros(2, 1, dtype=torch.long), 0, model.prefill(grid, concepts))

        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            work()
    assert 2 * sum(cost.counted(work)) == counter.get_total_flops() > 0
    with torch.inference_mode():  # where operators reach no mode in parts
        assert 2 * sum(cost.counted(work)) == counter.get_total_flops()


def test_pruning_saves_what_it_removes():
    whole, pruned = (macs_of(name) for name in ("tiny", "tiny, pruned"))
    assert pruned.prefix < whole.prefix and pruned.steps < whole.steps and pruned.attention < whole.attention
    assert pruned.encoder - whole.encoder == 100 * 9 * 24 * (40 - 48) + 100 * 9 * 48 * (40 - 48)  # 10 x 10 pixels, two convolutions


def test_bit_operations():
    macs = cost.Macs(encoder=2_000_000, concepts=1_000_000, prefix=2_000_000, steps=1_000_000, attention=500_000)
    assert macs.gbops(32) == pytest.approx(6.5e6 * 1024 / 1e9)
    assert macs.gbops(8) == pytest.approx((6e6 * 64 + 0.5e6 * 1024) / 1e9)  # products of activations stay float
    pooled = dataclasses.replace(macs, pooling=250_000)  # and so does what pools windows, of the million
    assert pooled.caption == macs.caption and pooled.gbops(8) == pytest.approx((5.75e6 * 64 + 0.75e6 * 1024) / 1e9)
    config = dataclasses.replace(preset("tiny", vocabulary=50), concepts=6, alignment=(8, 16), concept_vocabulary=(10, 2))
    assert cost.count_macs(config).pooling == len(windows(5)) * 25 * 8


@pytest.mark.parametrize("name", ["lightcap", "tiny, pruned"])
def test_costs_are_the_ledger_s(name):
    config = CONFIGS[name]
    found = cost.costs_of(config, bits=8)
    macs = macs_of(name)
    with torch.device("meta"):
        model = LightCap(config)
    assert found["params"] == sum(p.numel() for p in model.parameters()) == sum(found["params_by_part"].values())
    assert found["gmacs_caption"] == macs.caption / 1e9 and found["gflops_caption"] == 2 * found["gmacs_caption"]
    assert found["gmacs_encoder"] == macs.encoder / 1e9 and found["gbops_caption"] == macs.gbops(8)
    if name == "lightcap":
        assert found["params_by_part"] == {
            "encoder": 23_527_264, "alignment": 3_147_776, "modulator": 94_127, "embeddings": found["params_by_part"]["embeddings"],
            "layers": 14_252_592 - found["params_by_part"]["embeddings"], "grid_projection": 639_288, "heads": 325_362,
        }
        assert found["params_by_part"]["embeddings"] == (30522 + 512 + 2 + 2) * 312


def test_times_are_taken_in_turn():
    calls = []
    times = cost.interleaved([lambda turn: calls.append(("a", turn)), lambda turn: calls.append(("b", turn))], rounds=3, warm=1)
    assert calls == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(list_) for list_ in times] == [3, 3] and min(map(min, times)) >= 0


def test_quantiles():
    assert cost.quantiles([5.0, 1.0, 2.0, 4.0, 3.0]) == {"p50": 3.0, "p90": 5.0}
    assert cost.quantiles([float(i) for i in range(1, 12)]) == {"p50": 6.0, "p90": 10.0}
    assert cost.quantiles([7.0]) == {"p50": 7.0, "p90": 7.0}
