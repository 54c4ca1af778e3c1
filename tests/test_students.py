"""The student: the paper's counts, the sequence-to-sequence mask, folded heads, its file format."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from compress.training.batches import Captions, pack
from students.lightcap import LightCap, LightCapConfig, preset
from students.lightcap.dropout import Dropout
from students.lightcap.modulator import Modulator

VOCABULARY = 40
CAPTIONS = [[[2, 7, 9, 11, 3], [2, 30, 3], [2, 5, 5, 6, 8, 21, 3]], [[2, 17, 18, 3]], [[2, 39, 12, 3], [2, 4, 3]]]


def tiny(**changes) -> LightCap:
    """A small captioner whose weights are large enough that every path matters."""
    torch.manual_seed(1)
    model = LightCap(dataclasses.replace(preset("tiny", vocabulary=VOCABULARY, heads=3), **changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("encoder."):
                continue
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.3)
            else:
                weight.uniform_(0.7, 1.3)
    return model


@pytest.fixture(scope="module")
def model() -> LightCap:
    return tiny()


@pytest.fixture(scope="module")
def grid(model) -> torch.Tensor:
    return torch.randn(3, model.config.grid**2, model.config.channels, generator=torch.Generator().manual_seed(2))


def forced(model: LightCap, grid: torch.Tensor, captions: list) -> list[torch.Tensor]:
    """Logits (length, V) of every caption by teacher forcing, all captions of an image in one packed row."""
    batch = pack(Captions.of(captions), range(len(captions)))
    with torch.no_grad():
        states = model.states(grid, batch.tokens, batch.positions, batch.mask(grid.shape[1]))
        logits = model.heads(states, model.word)
    return [logits[row][batch.segments[row] == segment] for row, image in enumerate(captions) for segment in range(1, len(image) + 1)]


def stepwise(model: LightCap, grid: torch.Tensor, caption: list[int]) -> torch.Tensor:
    """Logits (length, V) of one caption of one image, one cached step after the other."""
    with torch.no_grad():
        past, rows = model.prefill(grid), []
        for position, token in enumerate(caption[:-1]):
            logits, past = model.step(torch.tensor([[token]]), position, past)
            rows.append(logits[0])
    return torch.stack(rows)


# ---- steps


def test_several_captions_of_an_image_share_its_prefix(model, grid):
    """Steps of four captions of each of three images, then of chosen ones of two images, are those of every caption alone."""
    captions = torch.randint(4, VOCABULARY, (3, 4, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        past, found = model.prefill(grid), []
        for position in range(5):
            logits, past = model.step(captions.flatten(0, 1)[:, position : position + 1], position, past)
            found.append(logits.unflatten(0, (3, 4)))
        assert len(past[0].keys) == 3 and past[0].own_keys.shape[::2] == (12, 5)
        chosen = torch.tensor([3, 3, 1, 0, 11, 8, 9, 10])
        kept = [seen.rows(chosen, torch.tensor([0, 2])) for seen in past]
        last, _ = model.step(torch.full((8, 1), 7), 5, kept)
    together = torch.stack(found, 2)
    for image in range(3):
        for index in range(4):
            alone = stepwise(model, grid[image : image + 1], [*captions[image, index].tolist(), 3])
            torch.testing.assert_close(together[image, index], alone, atol=1e-4, rtol=1e-4)
    for row, caption in enumerate(chosen.tolist()):
        image, index = divmod(caption, 4)
        alone = stepwise(model, grid[image : image + 1], [*captions[image, index].tolist(), 7, 3])
        torch.testing.assert_close(last[row], alone[-1], atol=1e-4, rtol=1e-4)


# ---- sizes


def test_the_paper_s_counts():
    with torch.device("meta"):
        model = LightCap(preset("lightcap"))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    grid = sum(p.numel() for p in model.fusion.grid.parameters())
    assert count["encoder"] == 23_527_264
    assert count["modulator"] == 94_127
    assert count["fusion"] - grid == 14_252_592
    assert grid == 639_288
    assert count["heads"] == 325_362
    assert count["alignment"] == 3_147_776
    assert sum(p.numel() for p in model.parameters()) == 41_986_409


def test_presets_and_encoders_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="no preset 'lightcaps'.*did you mean 'lightcap'"):
        preset("lightcaps")
    with pytest.raises(ValueError, match="no image encoder 'clip-rn5'.*did you mean 'clip-rn50'"):
        preset("lightcap", encoder="clip-rn5")
    with pytest.raises(ValueError, match=r"hidden \(30\) must be a multiple of attention_heads \(4\)"):
        preset("tiny", hidden=30, attention_heads=4)


@pytest.mark.parametrize(("encoder", "side"), [("resnet-small", 5), ("efficientnet-lite0", 7), ("clip-rn50", 7)])
def test_the_grid_is_what_the_config_says(encoder, side):
    config = preset("tiny", encoder=encoder)
    with torch.device("meta"):
        model = LightCap(config).eval()
        grid = model.encode(torch.zeros(1, 3, config.image_size, config.image_size))
    assert grid.shape == (1, side * side, config.channels) and config.grid == side


def test_grid_tokens_go_row_by_row(model):
    pixels = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grid, tokens = model.encoder(pixels), model.encode(pixels)
    assert torch.equal(tokens[0, 1], grid[0, :, 0, 1]) and torch.equal(tokens[0, 5], grid[0, :, 1, 0])


# ---- one mask for training and decoding


def test_teacher_forcing_is_cached_decoding(model, grid):
    everything = forced(model, grid, CAPTIONS)
    place = 0
    for image, captions in enumerate(CAPTIONS):
        for caption in captions:
            alone = forced(model, grid[image : image + 1], [[caption]])[0]
            steps = stepwise(model, grid[image : image + 1], caption)
            assert everything[place].shape == (len(caption) - 1, VOCABULARY)
            torch.testing.assert_close(everything[place], steps, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(everything[place], alone, atol=1e-4, rtol=1e-4)
            place += 1
    spread = torch.cat(everything).std(0).mean()
    assert spread > 0.1  # the comparison would hold of a constant, too


def test_captions_do_not_see_each_other(model, grid):
    changed = json.loads(json.dumps(CAPTIONS))
    changed[0][1] = [2, 33, 34, 3]
    before, after = forced(model, grid, CAPTIONS), forced(model, grid, changed)
    for index in (0, 2, 3, 4, 5):
        torch.testing.assert_close(before[index], after[index], atol=1e-5, rtol=1e-5)
    assert (before[1][0] - after[1][0]).abs().max() < 1e-4  # after [CLS] alone
    assert (before[1][1] - after[1][1]).abs().max() > 0.1


def test_a_token_sees_none_after_it(model, grid):
    changed = json.loads(json.dumps(CAPTIONS))
    changed[0][2][3] = 31
    before, after = forced(model, grid, CAPTIONS)[2], forced(model, grid, changed)[2]
    torch.testing.assert_close(before[:3], after[:3], atol=1e-5, rtol=1e-5)
    for row in range(3, 6):
        assert (before[row] - after[row]).abs().max() > 0.05


def test_the_prefix_does_not_see_the_caption(model, grid):
    """With one layer more than the caption could reach: the prefix's own states, read by a probe of the first layer."""
    batch = pack(Captions.of(CAPTIONS), range(3))
    prefix = model.embed_prefix(grid)
    x = torch.cat([prefix, model.fusion.embed_caption(batch.tokens, batch.positions)], 1)
    first, mask = prefix.shape[1], batch.mask(prefix.shape[1])
    with torch.no_grad():
        whole, _ = model.fusion.layers[0](x, None, mask, 0)
        alone, _ = model.fusion.layers[0](prefix, None, None, 0)
    torch.testing.assert_close(whole[:, :first], alone, atol=1e-5, rtol=1e-5)


def test_every_part_of_the_prefix_matters(model, grid):
    other = grid.clone()
    other[0, -1] += 3
    before, after = forced(model, grid, CAPTIONS), forced(model, other, CAPTIONS)
    assert all((before[i] - after[i]).abs().amax(1).min() > 1e-3 for i in range(3))
    torch.testing.assert_close(before[3], after[3], atol=0, rtol=0)
    swapped = grid.flip(1)
    assert (forced(model, swapped, CAPTIONS)[0] - before[0]).abs().max() > 1e-2  # places are told apart


def test_probes_are_the_layers_states_and_attention(model, grid):
    batch = pack(Captions.of(CAPTIONS), range(3))
    mask, real, seen = batch.mask(grid.shape[1]), batch.segments > 0, []
    with torch.no_grad():
        states = model.states(grid, batch.tokens, batch.positions, mask, probe=seen)
    t, total = batch.tokens.shape[1], batch.tokens.shape[1] + grid.shape[1]
    assert len(seen) == 2
    for hidden, attention in seen:
        assert hidden.shape == (3, t, 32) and attention.shape == (3, 2, t, total)
        rows = attention.transpose(1, 2)[real]
        torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows), 2))
        assert (attention.masked_select(~mask[:, :, grid.shape[1] :].expand_as(attention)) == 0).all()
    torch.testing.assert_close(seen[-1][0][real], states[real])


# ---- heads, modulator, dropout


def test_heads_average_logits(model):
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folded = model.heads(x, model.word)
        separate = torch.nn.functional.linear(model.heads.branch_states(x), model.word, model.heads.bias)
        by_hand = torch.stack([branch(x) @ model.word.T + model.heads.bias for branch in model.heads.branches])
    assert separate.shape == (3, 4, 6, VOCABULARY)
    torch.testing.assert_close(separate, by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded, by_hand.mean(0), atol=1e-5, rtol=1e-5)
    assert (separate[0] - separate[1]).abs().max() > 0.5
    assert (model.heads(2 * x, model.word) - 2 * folded).abs().max() > 0.5  # no linear map: the heads do not collapse into one


def test_the_output_projection_is_the_embedding(model):
    assert "fusion.word.weight" in model.state_dict()
    assert sum(tuple(p.shape) == (VOCABULARY, 32) for p in model.parameters()) == 1


def test_modulator_gates_channels():
    torch.manual_seed(0)
    modulator = Modulator(8, 4, 6)
    grid, concepts = torch.randn(2, 5, 6), torch.randn(2, 2, 8)
    with torch.no_grad():
        found = modulator(grid, concepts)
        for image in range(2):
            gates = [torch.sigmoid(modulator.up(torch.relu(modulator.down(concepts[image, i])))) for i in range(2)]
            torch.testing.assert_close(found[image], grid[image] * (gates[0] + gates[1]) / 2)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_expected_value(p):
    layer = Dropout(p).train()
    x = torch.full((400, 1000), 3.0)
    torch.manual_seed(5)
    once = layer(x)
    assert float(once.mean()) == pytest.approx(3.0, abs=0.03)
    level = round(p * 256) / 256
    assert float((once == 0).float().mean()) == pytest.approx(level, abs=0.005)
    torch.testing.assert_close(once[once != 0], torch.full_like(once[once != 0], 3.0 / (1 - level)))
    assert torch.equal(layer.eval()(x), x)
    layer.train()
    torch.manual_seed(5)
    assert torch.equal(layer(x), once)
    assert not torch.equal(layer(x), once)
    lines = (once == 0).float()
    assert float(lines.mean(0).std()) < 0.05 and float(lines.mean(1).std()) < 0.05  # no column or row is favoured


def test_dropout_passes_gradients_where_it_kept():
    x = torch.ones(64, 64, requires_grad=True)
    assert Dropout(0.999).train()(x).isfinite().all()  # of 256ths the last but one
    out = Dropout(0.5).train()(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


# ---- vocabulary


def test_narrow_and_widen_undo_each_other(model, grid):
    model = tiny()
    word, bias = model.word.detach().clone(), model.heads.bias.detach().clone()
    keep = torch.tensor([2, 3, 7, 11, 38])
    full = stepwise(model, grid[:1], [2, 7, 11, 3])
    model.narrow(keep)
    assert model.config.vocabulary == 5 and model.word.shape == (5, 32)
    torch.testing.assert_close(stepwise(model, grid[:1], [0, 2, 3, 1]), full[:, keep], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.fusion.word.weight[4] += 1
    model.widen(keep, word, -100.0)
    assert model.config.vocabulary == VOCABULARY
    unseen = [i for i in range(VOCABULARY) if i not in keep.tolist()]
    assert torch.equal(model.word[unseen], word[unseen]) and torch.equal(model.word[keep[:4]], word[keep[:4]])
    assert torch.equal(model.word[38], word[38] + 1)
    assert torch.equal(model.heads.bias[keep], bias[keep]) and (model.heads.bias[unseen] == -100).all()
    after = stepwise(model, grid[:1], [2, 7, 11, 3])
    assert (after.argmax(-1)[:, None] == keep).any(1).all()  # what was never learned is never produced
    assert model.word.requires_grad and model.heads.bias.requires_grad


# ---- files

PRUNED = {
    "fusion.layers.0.query": (16, 32), "fusion.layers.0.key": (16, 32), "fusion.layers.0.value": (16, 32),
    "fusion.layers.0.output": (32, 16), "fusion.layers.1.up": (24, 32), "fusion.layers.1.down": (32, 24),
    "encoder.blocks.0.conv1": (40, 24, 3, 3), "encoder.blocks.0.bn1": (40,), "encoder.blocks.0.conv2": (48, 40, 3, 3),
}


@pytest.mark.parametrize("shapes", [{}, PRUNED], ids=["whole", "pruned"])
def test_saved_and_loaded_bit_by_bit(tmp_path, shapes):
    model = tiny(shapes=shapes, alignment=(16, 8), modulator=4, concepts=4, concept_vocabulary=(5, 2))
    model.encoder.to(memory_format=torch.channels_last)  # as training leaves it
    model.save_pretrained(tmp_path / "a")
    loaded = LightCap.from_pretrained(tmp_path / "a")
    assert loaded.config == model.config and not loaded.training
    assert {k: tuple(v) for k, v in loaded.config.shapes.items()} == shapes
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    if shapes:
        assert loaded.fusion.layers[0].query.out_features == 16 and loaded.encoder.blocks[0].bn1.num_features == 40
        assert loaded.encoder.blocks[0].bn1.running_var.shape == (40,)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert model.encoder.stem[3].weight.is_contiguous(memory_format=torch.channels_last)  # saving changes no model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, files: dict):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("size", [0, 5, 100, -1000])
def test_half_a_download(tmp_path, saved, size):
    content = saved["model.safetensors"]
    written(tmp_path, saved | {"model.safetensors": content[: size if size >= 0 else len(content) + size]})
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file") as raised:
        LightCap.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file(tmp_path, saved, missing):
    written(tmp_path, {name: content for name, content in saved.items() if name != missing})
    with pytest.raises(FileNotFoundError, match=f"no {missing} there"):
        LightCap.from_pretrained(tmp_path)


WRONG = [
    ({"model_type": "bert"}, "does not describe a LightCap model"),
    ({"n_layers": 3, "colour": 1}, "keys that this version does not know: colour, n_layers"),
    ({"hidden": 64}, "does not fit config.json"),
    ({"layers": 3}, "does not fit config.json"),
    ({"shapes": {"fusion.layers.9.up": [24, 32]}}, "gives a shape for 'fusion.layers.9.up'"),
    ({"shapes": {"fusion.layers.0.up": [24, 32]}}, "does not fit config.json"),
    ({"shapes": 5}, "config.json: alignment and concept_vocabulary must be lists, and shapes an object of lists"),
    ({"alignment": 5}, "config.json: alignment and concept_vocabulary must be lists"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_config(tmp_path, saved, change, message):
    config = json.loads(saved["config.json"]) | change
    written(tmp_path, saved | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=message) as raised:
        LightCap.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_not_json(tmp_path, saved):
    written(tmp_path, saved | {"config.json": saved["config.json"][:40]})
    with pytest.raises(ValueError, match="config.json: not JSON"):
        LightCap.from_pretrained(tmp_path)


def test_config_survives_json():
    config = dataclasses.replace(preset("lightcap"), shapes=PRUNED)
    assert LightCapConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LightCapConfig.from_dict(json.loads(json.dumps(config.to_dict() | {"quantized": {"bits": 8}}))) == config


def test_a_random_model_keeps_its_scale():
    """BERT's initialisation: a new captioner's first loss is near log V, not far above it."""
    torch.manual_seed(0)
    model = LightCap(preset("tiny", vocabulary=1000)).eval()
    with torch.no_grad():
        logits = forced(model, torch.randn(1, 25, 128), [[[2, 7, 9, 3]]])[0]
    loss = nn.functional.cross_entropy(logits, torch.tensor([7, 9, 3]))
    assert float(loss) == pytest.approx(np.log(1000), abs=0.5)
