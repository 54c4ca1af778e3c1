"""CIDEr optimisation: its loss against the stepwise model, and that it raises what it optimises."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from stage_context import context

from compress import data
from compress.artifact import Artifact
from compress.config import Data, Scst, Student, Train
from compress.decode import Special, beam_search, sample
from compress.stages import scst, train
from compress.training import loop
from compress.training.corpus import corpus
from compress.training.reward import CiderReward
from compress.training.start import read_captioner
from students.lightcap import LightCap, preset


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=8, val_images=4))


@pytest.fixture(scope="module")
def parent(tmp_path_factory, scenes) -> Artifact:
    folder = tmp_path_factory.mktemp("scst") / "parent"
    config = Train(preset="tiny", epochs=60, batch_images=8, learning_rate=4e-3, dropout=0.0)
    train.run(None, config, context(folder, scenes, "train", config, Student(preset="tiny", heads=2)))
    return Artifact(folder / "out")


def mean_reward(folder, scenes, cache) -> float:
    """Of 20 captions drawn for each training image, x100."""
    model, tokenizer, settings = read_captioner(folder)
    words = corpus(model, tokenizer, settings, context(cache, scenes, seed=0))
    images = np.arange(len(scenes.split("train").examples))
    drawn = sample(model, words.grid_of(model, images), Special.of(tokenizer), 20, seed=99)
    reward = CiderReward.of([example.captions for example in scenes.split("train").examples], tokenizer)
    return float(reward(images, [[item.tokens for item in image] for image in drawn]).mean())


def test_it_raises_the_reward_of_its_samples(parent, scenes, tmp_path):
    config = Scst(epochs=200, batch_images=8, learning_rate=1e-3, samples=6, dropout=0.0)
    scst.run(parent, config, context(tmp_path / "a", scenes, "scst", config))
    before, after = (mean_reward(folder, scenes, tmp_path) for folder in (parent.path, tmp_path / "a" / "out"))
    assert after > 1.15 * before > 0


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_baselines(parent, scenes, tmp_path, monkeypatch, baseline):
    """Advantages are the samples' rewards less the mean of the other samples', or less the greedy caption's."""
    seen = []

    def spy(model, grid, drawn, advantages, *rest):
        seen.append((grid, drawn, advantages))
        return loss(model, grid, drawn, advantages, *rest)

    loss = scst.policy_loss
    monkeypatch.setattr(scst, "policy_loss", spy)
    config = Scst(epochs=1, batch_images=8, samples=4, baseline=baseline)
    scst.run(parent, config, context(tmp_path / "a", scenes, "scst", config))
    grid, drawn, advantages = seen[0]
    model, tokenizer, settings = read_captioner(parent.path)
    words = corpus(model, tokenizer, settings, context(tmp_path, scenes, seed=0))
    images = words.batches(8, 17)(0).images
    reward = CiderReward.of([example.captions for example in scenes.split("train").examples], tokenizer)
    rewards = reward(images, [[words.keep[list(ids)].tolist() for ids in image] for image in drawn]) / 100
    if baseline == "mean":
        wanted = [[row[i] - np.delete(row, i).mean() for i in range(4)] for row in rewards]
    else:
        greedy = [item.tokens for item in beam_search(model, grid, Special.of(tokenizer), 1)]
        wanted = rewards - reward(images, [[ids] for ids in greedy]) / 100
    assert np.abs(advantages).max() > 0
    np.testing.assert_allclose(advantages, wanted, atol=1e-9)


def test_the_same_seed_gives_the_same_weights(parent, scenes, tmp_path):
    digests = []
    for name, seed in (("a", None), ("b", None), ("c", 3)):
        config = Scst(epochs=2, batch_images=8, learning_rate=1e-3, samples=3, seed=seed)
        scst.run(parent, config, context(tmp_path / name, scenes, "scst", config))
        digests.append(Artifact(tmp_path / name / "out").digest())
    assert digests[0] == digests[1] != digests[2]


def test_stopped_it_ends_as_undisturbed(parent, scenes, tmp_path, monkeypatch):
    config = Scst(epochs=4, batch_images=8, samples=3, flip=True, crop=0.2, learning_rate=1e-3)
    calm, stopped = (context(tmp_path / name, scenes, "scst", config) for name in "ab")
    scst.run(parent, config, calm)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", float("inf"))
    count, loss = itertools.count(), scst.policy_loss

    def stopping(*given):
        if next(count) == 2:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(scst, "policy_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        scst.run(parent, config, stopped)
    scst.run(parent, config, stopped)
    assert next(count) == 5 and Artifact(stopped.output).digest() == Artifact(calm.output).digest()


def test_a_search_draws_the_best_hypotheses_of_each_image(parent, scenes):
    model, tokenizer, settings = read_captioner(parent.path)
    special = Special.of(tokenizer)
    torch.manual_seed(0)
    grid = torch.randn(3, model.config.grid**2, model.config.channels)
    drawn = scst.draw(model, grid, special, Scst(draw="beams", samples=3), 0)
    best = [item.tokens for item in beam_search(model, grid, special, 3, model.config.max_tokens)]
    assert [image[0] for image in drawn] == best
    assert all(len(set(image)) == 3 for image in drawn)
    warm, cold = (scst.draw(model, grid, special, Scst(samples=20, temperature=t), 0) for t in (1.0, 1e-3))
    assert all(len(set(image)) == 1 for image in cold) and len(set(warm[0])) > 1  # near zero it is the greedy caption


def test_disturbed_pictures_are_encoded_in_every_step(parent, scenes, tmp_path, monkeypatch):
    seen = []

    def spy(model, grid, *rest):
        seen.append(grid)
        return loss(model, grid, *rest)

    loss = scst.policy_loss
    monkeypatch.setattr(scst, "policy_loss", spy)
    config = Scst(epochs=2, batch_images=8, samples=3, flip=True, crop=0.3)
    scst.run(parent, config, context(tmp_path / "a", scenes, "scst", config))
    before, after = (LightCap.from_pretrained(folder).encoder.state_dict() for folder in (parent.path, tmp_path / "a" / "out"))
    assert all(torch.equal(after[name], value) for name, value in before.items())  # frozen all the same
    assert not seen[0].requires_grad and not torch.allclose(seen[0], seen[1], rtol=0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_minus_advantage_times_log_probability(temperature):
    """Piece by piece from cached decoding, which shares no code with packed teacher forcing but the model."""
    torch.manual_seed(3)
    model = LightCap(dataclasses.replace(preset("tiny", vocabulary=30, heads=2), max_tokens=5)).eval()
    grid = torch.randn(2, model.config.grid**2, model.config.channels)
    special = Special(start=2, end=3, never=(0, 1, 4))
    drawn = [[(7, 8, 9), (10,), ()], [(11, 12), (5, 6, 7, 8, 9), (13, 14, 15, 16)]]  # one fills max_tokens: it has no [SEP]
    advantages = np.array([[1.0, -2.0, 0.5], [0.3, 4.0, -1.0]])
    total, pieces = 0.0, 0
    with torch.no_grad():
        for image in range(2):
            for ids, advantage in zip(drawn[image], advantages[image], strict=True):
                past, fed = model.prefill(grid[image : image + 1]), [special.start, *ids]
                wanted = [*ids, special.end][:5]
                for position, piece in enumerate(wanted):
                    logits, past = model.step(torch.tensor([[fed[position]]]), position, past)
                    total -= advantage * float((logits / temperature).log_softmax(-1)[0, piece])
                    pieces += 1
    found = scst.policy_loss(model, grid, drawn, advantages, special, temperature)
    assert pieces == 4 + 2 + 1 + 3 + 5 + 5
    assert found.item() == pytest.approx(total / pieces, rel=1e-4)
