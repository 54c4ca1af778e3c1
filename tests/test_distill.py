"""Ensemble distillation end to end on a few scenes: which teacher teaches which head, and what is refused."""

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stage_context import context
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from compress import data
from compress.artifact import Artifact
from compress.config import Data, Distill, Stage, Student, Vocabulary
from compress.context import Progress
from compress.errors import DataError, ModelError, RecipeError, UsageError
from compress.stages import distill, vocabulary
from compress.training import distillation, targets
from compress.training.batches import Captions, pack
from compress.training.corpus import UNSEEN_BIAS, check_tokenizer, corpus
from compress.training.losses import token_loss
from compress.training.start import new_captioner, read_captioner, write_captioner
from students.lightcap import LightCap, preset
from students.lightcap.bert import copy_layers
from students.lightcap.tokenizer import SPECIAL, encode_captions, load_tokenizer, narrowed, pieces_of, read_tokenizer, word_pieces
from teachers.lightcap import LightCapTeacher

STUDENT = Student(preset="tiny", heads=3)
ALL = ("tokens", "hidden", "attention")


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=40, val_images=4))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Artifact]:
    """Three captioners that agree on their encoder and differ in what they say: each has its own head on the same fusion."""
    folder = tmp_path_factory.mktemp("teachers")
    model, tokenizer, settings = new_captioner(dataclasses.replace(STUDENT, heads=1), "tiny", None, None, 0.0, 5)
    found = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not name.startswith("encoder."):
                weight.normal_(0, weight.shape[1] ** -0.5)
        for name in ("teacher", "teacher-2", "teacher-3"):
            model.heads.branches[0].transform.weight.normal_(0, 0.3)
            model.heads.branches[0].norm.bias.normal_(0, 0.5)
            (folder / name).mkdir()
            write_captioner(folder / name, model.eval(), tokenizer, settings)
            found[name] = Artifact(folder / name)
    return found


@pytest.fixture
def run(tmp_path, scenes, teachers):
    """Runs the stage, and gives the artifact that it wrote."""

    def go(config: Distill, student: Student = STUDENT, sources=None, parent: Artifact | None = None, name: str = "x") -> Artifact:
        config = config if config.teachers else dataclasses.replace(config, teachers=tuple(teachers))
        cache, made = tmp_path / "cache", sources or teachers
        here = context(tmp_path / name, scenes, "distill", config, student, "student", cache=cache, artifacts=made)
        distill.run(parent, config, here)
        return Artifact(here.output)

    return go


def losses(student: LightCap, tokenizer, teachers: dict[str, Artifact], scenes, tmp_path) -> np.ndarray:
    """(head, teacher): how far each head's pieces are from each teacher's, over the whole vocabulary."""
    settings = {"image_size": 80, "resize": "squash", "interpolation": "bicubic"} | distill.read_captioner(teachers["teacher"].path)[2]
    words = corpus(student, tokenizer, settings, context(tmp_path, scenes))
    batch = words.batches(20, 3)(0)
    real = batch.targets > -1
    grid = words.grid_of(student, batch.images)
    found = np.zeros((3, 3))
    with torch.no_grad():
        mask = batch.mask(grid.shape[1])
        student.narrow(words.keep)
        states = student.heads.branch_states(student.states(grid, batch.tokens, batch.positions, mask)[real])
        said = F.linear(states, student.word, student.heads.bias).log_softmax(-1)
        for column, source in enumerate(teachers.values()):
            model = LightCap.from_pretrained(source.path)
            model.narrow(words.keep)
            best, ids = model.heads(model.states(grid, batch.tokens, batch.positions, mask)[real], model.word).softmax(-1).topk(8)
            for head in range(3):
                found[head, column] = float(token_loss(said[head].gather(-1, ids), best, 1.0))
    return found


def test_each_teacher_teaches_its_own_head(run, teachers, scenes, tmp_path):
    config = Distill(init="weights", match=("tokens",), epochs=40, batch_images=40, learning_rate=1e-2, token_weight=1.0, dropout=0.0)
    made = run(config)
    student = LightCap.from_pretrained(made.path)
    assert student.config.heads == 3 and student.config.vocabulary == LightCap.from_pretrained(teachers["teacher"].path).config.vocabulary
    found = losses(student, read_tokenizer(made.path / "tokenizer.json"), teachers, scenes, tmp_path)
    for head in range(3):
        others = [found[head, other] for other in range(3) if other != head]
        assert found[head, head] < 0.7 * min(others), found
        assert found[head, head] < 0.7 * min(found[other, head] for other in range(3) if other != head), found


def test_a_student_may_start_anew_beside_weights(run, tmp_path):
    """`init: random` reads no weights, though the student section names some."""
    section = dataclasses.replace(STUDENT, fusion_weights=str(tmp_path / "none.safetensors"), tokenizer="english")
    config = Distill(init="weights", epochs=0.01, batch_images=40, learning_rate=1e-9, dropout=0.0)
    with pytest.raises(ModelError, match="none.safetensors"):
        run(config, section)
    anew, again = (LightCap.from_pretrained(run(dataclasses.replace(config, init="random"), of, name=name).path)
                   for name, of in (("random", section), ("without", STUDENT)))
    assert all(torch.equal(weight, other) for weight, other in zip(anew.parameters(), again.parameters(), strict=True))


def test_a_student_that_starts_as_its_teachers_says_what_they_say(run, teachers, scenes, tmp_path):
    config = Distill(init="teacher", match=("tokens",), epochs=0.01, batch_images=40, learning_rate=1e-9, dropout=0.0)
    made = run(config)
    found = losses(LightCap.from_pretrained(made.path), read_tokenizer(made.path / "tokenizer.json"), teachers, scenes, tmp_path)
    assert np.diag(found) == pytest.approx(np.zeros(3), abs=1e-3) and found[0, 1] > 0.1
    mine, theirs = (LightCap.from_pretrained(path) for path in (made.path, teachers["teacher"].path))
    same = zip(mine.encoder.state_dict().values(), theirs.encoder.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_same_seed_gives_the_same_student(run):
    config = Distill(init="teacher", match=ALL, epochs=1, match_epochs=0.5, batch_images=10, learning_rate=1e-3)
    first, again = run(config, name="a"), run(config, name="b")
    other = run(dataclasses.replace(config, seed=18), name="c")
    assert first.digest() == again.digest() != other.digest()
    tokens = run(dataclasses.replace(config, match=("tokens",)), name="d")
    assert tokens.digest() != first.digest()  # hidden states and attention were compared
    assert run(dataclasses.replace(config, match_epochs=0.0), name="e").digest() == tokens.digest()


def test_teachers_whose_tokens_weigh_nothing_are_not_asked_for_them(run, tmp_path):
    config = Distill(init="teacher", epochs=1, batch_images=10, learning_rate=1e-3, match=("tokens",), token_weight=0.0)
    made = run(config)
    assert not (tmp_path / "cache" / "targets").exists()
    captions_alone = run(dataclasses.replace(config, match=("hidden",), match_epochs=0.0), name="b")
    assert made.digest() == captions_alone.digest() != run(dataclasses.replace(config, token_weight=0.8), name="c").digest()


def test_one_teacher_teaches_every_head(run, teachers):
    made = run(Distill(teachers=("teacher-2",), init="weights", epochs=1, batch_images=40))
    assert LightCap.from_pretrained(made.path).config.heads == 3


def test_heads_of_one_teacher_part(run, teachers):
    """Only the first starts as the teacher's own: copies of it, taught alike, would stay copies."""
    own = {name: LightCap.from_pretrained(artifact.path).heads.branches[0].transform.weight for name, artifact in teachers.items()}
    for named in (("teacher",), ("teacher",) * 3, ("teacher", "teacher", "teacher-2")):
        config = Distill(teachers=named, epochs=0.01, batch_images=40, learning_rate=1e-9)
        made = LightCap.from_pretrained(run(config, name="x".join(named)).path)
        heads = [branch.transform.weight for branch in made.heads.branches]
        like = [[name for name, weight in own.items() if torch.allclose(head, weight, atol=1e-4)] for head in heads]
        assert like == [["teacher"], [], ["teacher-2"] if "teacher-2" in named else []], named
        assert not torch.allclose(heads[1], heads[2], atol=1e-3)


def test_heads_learn_from_all_teachers_or_from_the_heads_before_them(run, teachers):
    digests = {run(Distill(ensemble=e, epochs=1, batch_images=40), name=e).digest() for e in ("each", "all", "running")}
    assert len(digests) == 3


def test_a_student_of_one_teacher_with_as_many_heads_starts_as_it(run, teachers, scenes):
    """A teacher of several heads says their mean: a student that had only its first head would start far from it."""
    many = run(Distill(teachers=("teacher",), heads=2, init="weights", epochs=0.01, batch_images=40), name="many")
    config = Distill(teachers=("many",), heads=2, epochs=0.01, batch_images=40, learning_rate=1e-12, dropout=0.0)
    made = LightCap.from_pretrained(run(config, sources={"many": many}, name="made").path)
    for mine, its in zip(made.heads.branches, LightCap.from_pretrained(many.path).heads.branches, strict=True):
        torch.testing.assert_close(mine.transform.weight, its.transform.weight, atol=1e-6, rtol=0)


def test_one_head_becomes_three_for_three_teachers(run, teachers):
    one = run(Distill(teachers=("teacher",), init="weights", heads=1, epochs=0.01, batch_images=40), name="one")
    config = Distill(heads=3, epochs=0.01, batch_images=40, learning_rate=1e-9, dropout=0.0)
    three = LightCap.from_pretrained(run(config, parent=one, name="three").path)
    before = LightCap.from_pretrained(one.path)
    assert before.config.heads == 1 and three.config.heads == len(three.heads.branches) == 3
    grid = torch.randn(2, before.config.grid**2, before.config.channels)
    for model in (before, three):
        model.eval()
    torch.testing.assert_close(*(first_logits(model, grid) for model in (before, three)), atol=1e-4, rtol=1e-4)


def first_logits(model: LightCap, grid: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.step(torch.full((2, 1), 2), 0, model.prefill(grid))[0]


@pytest.mark.parametrize("own", [None, 16])
def test_a_student_narrower_than_its_teacher_by_a_share(run, teachers, own):
    """What the section says goes first."""
    made = run(Distill(ffn_share=0.8, epochs=1, batch_images=40), dataclasses.replace(STUDENT, ffn=own))
    wide = LightCap.from_pretrained(teachers["teacher"].path).config.ffn
    assert LightCap.from_pretrained(made.path).config.ffn == (own or round(0.1 * wide) * 8) < wide


def test_teachers_of_other_sizes_teach_through_maps(run, teachers):
    student = Student(preset="scenes-student", layers=1, hidden=48, attention_heads=3, ffn=64, heads=3)
    made = run(Distill(init="weights", match=ALL, epochs=1, batch_images=40), student)
    config = LightCap.from_pretrained(made.path).config
    assert (config.hidden, config.layers, config.vocabulary) == (48, 1, preset("tiny", vocabulary=config.vocabulary).vocabulary)


# ---- what cannot be distilled


def refused(run, *arguments, **more) -> str:
    with pytest.raises(RecipeError) as raised:
        run(*arguments, **more)
    assert isinstance(raised.value, UsageError) and raised.value.exit_code == 2 and "\n" not in raised.value.message
    return raised.value.message


def test_another_hidden_size_cannot_start_from_its_teacher(run):
    message = refused(run, Distill(init="teacher"), Student(preset="scenes-student", heads=3))
    assert "hidden size 96 cannot start from a teacher of 32; set init: weights" in message


def test_a_wider_feed_forward_cannot_start_from_its_teacher(run):
    assert "size mismatch for" in refused(run, Distill(init="teacher"), dataclasses.replace(STUDENT, ffn=96))


def rewritten(teachers, folder, change) -> dict[str, Artifact]:
    """The teachers with another vocabulary in the second."""
    model, tokenizer, settings = distill.read_captioner(teachers["teacher-2"].path)
    pieces = pieces_of(tokenizer)
    keep = change(list(range(len(pieces))))
    model.narrow(torch.tensor(keep))
    (folder / "other").mkdir()
    write_captioner(folder / "other", model, narrowed(tokenizer, keep), settings)
    return teachers | {"teacher-2": Artifact(folder / "other")}


@pytest.mark.parametrize("change", [lambda ids: [*ids[:200], ids[201], ids[200], *ids[202:]], lambda ids: ids[:500]], ids=["order", "size"])
def test_another_vocabulary_is_refused_by_its_content(run, teachers, tmp_path, change):
    sources = rewritten(teachers, tmp_path, change)
    assert "teacher 'teacher-2': its word pieces are not the student's" in refused(run, Distill(), sources=sources)


@pytest.mark.parametrize("init", ["teacher", "weights"])
def test_a_teacher_of_fewer_pieces_is_refused_before_the_student_is_built(run, teachers, tmp_path, init):
    """All teachers agree, but not with the recipe's tokenizer: the student would hold rows that no piece names."""
    other = rewritten(teachers, tmp_path, lambda ids: ids[:500])["teacher-2"]
    assert "its word pieces are not the student's" in refused(run, Distill(teachers=("one",), init=init), sources={"one": other})


# ---- vocabulary


def test_vocabulary_keeps_what_training_captions_use(scenes, teachers, tmp_path):
    from students.lightcap.tokenizer import decode_caption, encode_captions

    parent = teachers["teacher"]
    here = context(tmp_path, scenes, "vocabulary", Vocabulary(), parent="teacher")
    vocabulary.run(parent, here.stage.config, here)
    small, tokenizer = LightCap.from_pretrained(tmp_path / "out"), read_tokenizer(tmp_path / "out" / "tokenizer.json")
    large, whole = LightCap.from_pretrained(parent.path), load_tokenizer("english")
    assert small.config.vocabulary == tokenizer.get_vocab_size() < 0.1 * large.config.vocabulary
    captions = [caption for example in scenes.split("train").examples for caption in example.captions][:20]
    before, after = (encode_captions(t, [*captions, "a zebra"], 20) for t in (whole, tokenizer))
    for old, new in zip(before[:-1], after[:-1], strict=True):
        assert [pieces_of(whole)[i] for i in old] == [pieces_of(tokenizer)[i] for i in new]
        assert torch.equal(small.word[new], large.word[old]) and torch.equal(small.heads.bias[new], large.heads.bias[old])
    kept = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert kept["pieces_before"] == large.config.vocabulary
    assert [pieces_of(whole)[i] for i in kept["kept"]] == list(pieces_of(tokenizer))
    often = dataclasses.replace(here, output=tmp_path / "often")
    often.output.mkdir()
    vocabulary.run(parent, Vocabulary(min_count=20), often)
    fewer = read_tokenizer(often.output / "tokenizer.json")
    counts = Counter(i for ids in encode_captions(whole, [c for e in scenes.split("train").examples for c in e.captions], 20) for i in ids)
    words = {pieces_of(whole)[i]: count for i, count in counts.items() if len(pieces_of(whole)[i].removeprefix("##")) > 1}
    kept_words = {piece for piece in pieces_of(fewer) if piece in words}
    assert kept_words == {piece for piece, count in words.items() if count >= 20} and 0 < len(kept_words) < len(words)
    spelled = [pieces_of(tokenizer)[i] for i in after[-1][1:-1]]
    assert spelled == ["a", "z", "##e", "##b", "##r", "##a"]  # never seen, and still said
    assert decode_caption(tokenizer, after[-1]) == "a zebra"


def test_what_is_kept_ends_captions_and_serves_others(teachers, scenes, tmp_path):
    """Where every caption is cut off, none has [SEP]; a teacher's own pieces are in no caption."""
    model, tokenizer, settings = distill.read_captioner(teachers["teacher"].path)
    model.config = dataclasses.replace(model.config, max_tokens=1)
    here = context(tmp_path, scenes)
    assert {2, 3, 7000} <= set(corpus(model, tokenizer, settings, here, beside={7000}).keep.tolist())
    assert 7000 not in corpus(model, tokenizer, settings, here).keep


def test_pieces_that_words_are_newly_spelled_by_can_be_learned(scenes, teachers, tmp_path):
    """No caption held them while their words were pieces: training left them the bias of what is never said."""
    model, whole, settings = read_captioner(teachers["teacher"].path)
    captions = [caption for example in scenes.split("train").examples for caption in example.captions]
    used = sorted({piece for ids in encode_captions(whole, captions, 20) for piece in ids})
    bias = torch.full_like(model.heads.bias, UNSEEN_BIAS)
    bias[used] = torch.linspace(-9, 3, len(used))
    model.heads.bias.data.copy_(bias)
    (tmp_path / "parent").mkdir()
    write_captioner(tmp_path / "parent", model, whole, settings)
    here = context(tmp_path, scenes, "vocabulary", Vocabulary(min_count=20), parent="teacher")
    vocabulary.run(Artifact(tmp_path / "parent"), here.stage.config, here)
    small, tokenizer, _ = read_captioner(here.output)
    kept = json.loads((here.output / "vocabulary.json").read_text())["kept"]
    spelling = {piece for ids in encode_captions(tokenizer, captions, 20) for piece in ids}
    new = [place for place in spelling if kept[place] not in used]
    same = [place for place in range(len(kept)) if place not in new]
    assert new and torch.equal(small.heads.bias[same], bias[kept][same])
    assert small.heads.bias[new].tolist() == [float(bias[[piece for piece in kept if piece in used]].min())] * len(new)


def test_a_tokenizer_that_cannot_be_cut_is_refused_before_a_vocabulary_stage(scenes, tmp_path):
    vocabulary = {piece: number for number, piece in enumerate((*SPECIAL, "a"))}
    pieces = Tokenizer(tokenizer_models.BPE(vocabulary, [], unk_token="[UNK]"))
    here = context(tmp_path, scenes)
    cut = dataclasses.replace(here.recipe, stages=(*here.recipe.stages, Stage("vocabulary", "v", None, Vocabulary())))
    with pytest.raises(ModelError, match="only WordPiece vocabularies can be narrowed, this one is BPE: give a tokenizer with WordPiece"):
        check_tokenizer(pieces, dataclasses.replace(here, recipe=cut))


def test_captions_that_the_tokenizer_does_not_know_are_told_of(scenes, tmp_path):
    """Most of them are refused: what is unknown is never said."""
    for strange in (2, 40):
        examples = [dataclasses.replace(example, captions=("собака бежит",)) if number < strange else example
                    for number, example in enumerate(scenes.split("train").examples)]
        data, said = dataclasses.replace(scenes, examples=tuple(examples)), io.StringIO()
        here = context(tmp_path, data, progress=Progress(stream=said))
        if strange == 40:
            with pytest.raises(DataError, match="the tokenizer does not know 100% of the captions' word pieces: name one of their"):
                check_tokenizer(load_tokenizer("english"), here)
        else:
            check_tokenizer(load_tokenizer("english"), here)
            assert said.getvalue().endswith("of the captions' word pieces are unknown to the tokenizer, and will not be said\n")


def test_a_smaller_vocabulary_splits_and_joins_as_the_whole_one(tmp_path):
    """A cased tokenizer.json stays cased."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "dog", "in", "Paris", "cat", "P", "##a"]
    settings = json.loads(word_pieces(pieces).to_str())
    settings["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    whole = read_tokenizer(tmp_path / "tokenizer.json")
    small = narrowed(whole, [i for i in range(len(pieces)) if i != 9])
    assert small.encode("A dog in Paris", add_special_tokens=False).tokens == ["A", "dog", "in", "Paris"]
    assert pieces_of(small) == [piece for piece in pieces if piece != "cat"] and small.token_to_id("[MASK]") == 4
    assert small.encode("cat", add_special_tokens=False).tokens == ["[UNK]"]
    assert small.decode([5, 6, 7, 8, 3], skip_special_tokens=True) == "A dog in Paris"
    lower = word_pieces([*pieces[:5], "a", "dog"])
    assert narrowed(lower, range(7)).to_str() == lower.to_str()


def test_layers_start_from_the_layers_they_learn_from():
    teacher, student = (LightCap(preset("tiny", vocabulary=20, layers=layers)).fusion for layers in (5, 2))
    copy_layers(student, teacher)
    sources = [[i for i, layer in enumerate(teacher.layers) if torch.equal(layer.up.weight, mine.up.weight)] for mine in student.layers]
    assert sources == [[2], [4]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teachers_are_asked_in_the_precision_of_the_stage(run, monkeypatch, precision):
    asked = []
    real = targets.autocast
    monkeypatch.setattr(targets, "autocast", lambda chosen, where: asked.append(chosen) or real(chosen, where))
    run(Distill(epochs=0.1, batch_images=20, precision=precision))
    assert set(asked) == {precision}


def test_hidden_states_come_from_the_mapped_layer_through_a_trained_map(run, monkeypatch):
    """A student of one layer learns from the second of two; the map begins as the identity, and is trained."""
    shown, asked, maps = [], [], []
    probe, real, fit = LightCapTeacher.probe, distillation.hidden_loss, distillation.fit
    monkeypatch.setattr(distillation, "fit", lambda modules, *rest: fit(modules, *rest) or maps.extend(modules["maps"]))
    monkeypatch.setattr(LightCapTeacher, "probe", lambda self, *given: shown.append(probe(self, *given)) or shown[-1])
    monkeypatch.setattr(distillation, "hidden_loss", lambda mine, theirs, where: asked.append((mine, theirs)) or real(mine, theirs, where))
    run(Distill(init="weights", match=("hidden",), epochs=1, batch_images=20), dataclasses.replace(STUDENT, layers=1))
    assert len(asked) == 2 and all(asked[i][1] is shown[i][1][0] for i in range(2))
    assert len(maps) == 1 and not torch.equal(maps[0].weight, torch.eye(32)) and torch.allclose(maps[0].weight, torch.eye(32), atol=0.01)


def test_layers_are_matched_at_all_of_a_caption(run, teachers, scenes, tmp_path, monkeypatch):
    """Of a student of masked pieces at those, too, that are not masked; [SEP], which a causal one only predicts, it also reads."""
    compared = []
    monkeypatch.setattr(distillation, "hidden_loss", lambda mine, theirs, where: compared.append(int(where.sum())) or mine.sum() * 0.0)
    model, tokenizer, settings = read_captioner(teachers["teacher"].path)
    model.config = dataclasses.replace(model.config, mask_piece=tokenizer.token_to_id("[MASK]"))
    (tmp_path / "masked").mkdir()
    write_captioner(tmp_path / "masked", model, tokenizer, settings)
    config = Distill(teachers=("teacher",), match=("hidden",), epochs=1, batch_images=40)
    for name, teacher in (("a", teachers["teacher"]), ("b", Artifact(tmp_path / "masked"))):
        run(config, sources={"teacher": teacher}, name=name)
    train = scenes.split("train")
    captions = [caption for example in train.examples for caption in example.captions]
    lengths = [len(ids) for ids in encode_captions(tokenizer, captions, model.config.max_tokens)]
    assert compared == [sum(lengths) - len(lengths)] * 2 + [sum(lengths)] * 2  # each for both layers


def test_each_weight_is_that_of_its_loss(run, monkeypatch):
    """Where one of the two losses says nothing, its weight changes nothing, and the other's does."""
    given = {"init": "weights", "match": ("hidden", "attention"), "epochs": 1, "batch_images": 20}
    weights = ("hidden_weight", "attention_weight")
    for silent, its, others in (("hidden_loss", *weights), ("attention_loss", *reversed(weights))):
        with monkeypatch.context() as patched:
            real = getattr(distillation, silent)
            patched.setattr(distillation, silent, lambda *arguments, real=real: 0.0 * real(*arguments))
            plain, same, other = (run(Distill(**given | more), name=f"{silent}{i}").digest()
                                  for i, more in enumerate(({}, {its: 5.0}, {others: 5.0})))
        assert plain == same != other


def test_heads_are_taught_at_a_temperature():
    """Kullback-Leibler divergence of whole distributions, both at that temperature, times its square; the mean over heads."""
    torch.manual_seed(0)
    model = LightCap(preset("tiny", vocabulary=12, heads=2))
    states, batch = torch.randn(3, 32), pack(Captions.of([[[2, 5, 7, 3]]]), [0])
    teachers = torch.randn(2, 3, 12)
    best, ids = (teachers / 2.0).softmax(-1).topk(12, dim=-1)
    goal = distillation.Goal(("tokens",), temperature=2.0)
    found = distillation.head_loss(model, states, batch, (ids, best), goal, 0.1)
    said = F.linear(model.heads.branch_states(states), model.word, model.heads.bias) / 2.0
    pairs = zip(said.log_softmax(-1), (teachers / 2.0).log_softmax(-1), strict=True)
    wanted = torch.stack([F.kl_div(mine, theirs, log_target=True, reduction="batchmean") for mine, theirs in pairs]).mean()
    torch.testing.assert_close(found, 4.0 * wanted, rtol=1e-3, atol=1e-4)
