"""Losses against closed forms and PyTorch's own, in float64 where that matters."""

import pytest
import torch
import torch.nn.functional as F

from compress.training import softmax
from compress.training.distillation import Goal, ensemble_loss
from compress.training.losses import attention_loss, caption_loss, hidden_loss, token_loss
from compress.training.softmax import Logits, logits_at


def drawn(*shape, seed=0, scale=2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(logits: torch.Tensor, ids: torch.Tensor) -> Logits:
    return Logits(logits.logsumexp(-1), logits.mean(-1), logits.gather(-1, ids))


def kl(logits: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """`token_loss` from the whole logits."""
    return token_loss((logits / temperature).log_softmax(-1).gather(-1, ids), probabilities, temperature)


@pytest.mark.parametrize("rows", [3, 7, 512])
def test_block_by_block_is_the_whole_softmax(rows, monkeypatch):
    """Values and gradients of states, embedding and bias against plain autograd over whole logits."""
    monkeypatch.setattr(softmax, "ROWS", rows)
    inputs = [drawn(17, 6, seed=1), drawn(23, 6, seed=2), drawn(23, seed=3)]
    ids = torch.randint(0, 23, (17, 4), generator=torch.Generator().manual_seed(4))
    weights = [drawn(17, seed=5), drawn(17, seed=6), drawn(17, 4, seed=7)]
    gradients = []
    for blocked in (True, False):
        states, word, bias = (x.clone().requires_grad_() for x in inputs)
        found = logits_at(states, word, bias, ids) if blocked else seen(F.linear(states, word, bias), ids)
        parts = (found.total, found.mean, found.picked)
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
        gradients.append([*(part.detach() for part in parts), states.grad, word.grad, bias.grad])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_block_by_block_in_bf16():
    """Products in bf16, sums in fp32: as near to the exact loss as bf16's eight bits allow, and trainable."""
    states, word, bias = drawn(600, 32, seed=1).requires_grad_(), drawn(90, 32, seed=2, scale=0.2).requires_grad_(), drawn(90, seed=3)
    targets = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = caption_loss(logits_at(states, word, bias, targets.unsqueeze(1)), 0.1)
    loss.backward()
    exact = [x.detach().clone().requires_grad_() for x in (states, word)]
    wanted = F.cross_entropy(F.linear(*exact, bias), targets, label_smoothing=0.1)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=3e-3)
    for mine, other in zip((states, word), exact, strict=True):
        assert F.cosine_similarity(mine.grad.flatten(), other.grad.flatten(), 0) > 0.999


def test_a_weighted_caption_loss_counts_places_by_their_weights():
    """Weights stay what they are: a batch of captions that nobody agrees with teaches little, and none at all no NaN."""
    logits, targets, rows = torch.randn(4, 7), torch.tensor([1, 2, 3, 4]), [0, 0, 2]
    weighted = caption_loss(seen(logits, targets.unsqueeze(1)), 0.1, torch.tensor([2.0, 0.0, 1.0, 0.0]))
    assert float(weighted) == pytest.approx(3 / 4 * float(caption_loss(seen(logits[rows], targets[rows].unsqueeze(1)), 0.1)))
    assert float(caption_loss(seen(logits, targets.unsqueeze(1)), 0.1, torch.zeros(4))) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_caption_loss_is_label_smoothed_cross_entropy(smoothing):
    logits, targets = drawn(6, 9), torch.tensor([0, 3, 8, 8, 2, 5])
    wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    assert float(caption_loss(seen(logits, targets.unsqueeze(1)), smoothing)) == pytest.approx(float(wanted), rel=1e-5)


def best(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities, ids = (teacher / temperature).softmax(-1).topk(k)
    return ids, probabilities


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_token_loss_over_the_whole_vocabulary_is_the_kl(temperature):
    student, teacher = drawn(3, 5, 12, seed=1), drawn(3, 5, 12, seed=2)
    p, q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    wanted = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean() * temperature**2
    found = kl(student, *best(teacher, 12, temperature), temperature)
    assert float(wanted) > 0.5
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_token_loss_bins_the_tail(k, temperature):
    student, teacher = drawn(4, 12, seed=1), drawn(4, 12, seed=2)
    ids, probabilities = best(teacher, k, temperature)
    total = 0.0
    for row in range(4):
        q = (student[row].double() / temperature).softmax(-1)
        p = probabilities[row].double()
        kept = sum(float(a * (a / q[i]).log()) for a, i in zip(p, ids[row], strict=True))
        rest, tail = float(1 - p.sum()), float(1 - q[ids[row]].sum())
        total += kept + rest * float(torch.tensor(rest / tail).log())
    assert float(kl(student, ids, probabilities, temperature)) == pytest.approx(total / 4 * temperature**2, rel=1e-4)


def test_token_loss_is_zero_only_at_the_teacher():
    teacher = drawn(4, 12, seed=2)
    ids, probabilities = best(teacher, 4, 1.0)
    assert float(kl(teacher, ids, probabilities, 1.0)) == pytest.approx(0.0, abs=1e-5)
    assert float(kl(teacher + 7, ids, probabilities, 1.0)) == pytest.approx(0.0, abs=1e-5)
    for seed in range(5):
        assert float(kl(teacher + drawn(4, 12, seed=seed, scale=0.1), ids, probabilities, 1.0)) > 0


def test_token_loss_teaches_the_teacher_s_probabilities():
    """Its gradient at each kept piece is the student's probability less the teacher's: that of the full KL, once the tails agree."""
    teacher = drawn(2, 8, seed=2)
    student = drawn(2, 8, seed=3).requires_grad_()
    ids, probabilities = best(teacher, 8, 1.0)
    kl(student, ids, probabilities, 1.0).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 2, atol=1e-4, rtol=1e-3)


def test_token_loss_survives_certainty_and_half_precision():
    logits = torch.zeros(2, 12)
    logits[:, 3] = 60.0
    logits.requires_grad_()
    ids, probabilities = torch.tensor([[3, 1], [4, 1]]), torch.tensor([[1.0, 0.0], [0.9995, 0.0010]])
    loss = kl(logits, ids, probabilities, 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    teacher, student = drawn(50, 30, seed=4), drawn(50, 30, seed=5)
    ids, probabilities = best(teacher, 6, 1.0)
    exact, halved = (float(kl(student, ids, p, 1.0)) for p in (probabilities, probabilities.half().float()))
    assert halved == pytest.approx(exact, rel=2e-3)


def test_losses_are_means_over_pieces():
    """A batch of everything is the mean over its pieces: no matter how they were batched, nor how many images there are."""
    student, teacher = drawn(3, 10, 12, seed=1), drawn(3, 10, 12, seed=2)
    ids, probabilities = best(teacher, 4, 1.0)
    whole = kl(student, ids, probabilities, 1.0)
    parts = [kl(student[:, i : i + 1], ids[:, i : i + 1], probabilities[:, i : i + 1], 1.0) for i in range(10)]
    assert float(whole) == pytest.approx(float(sum(parts)) / 10, rel=1e-5)
    doubled = kl(*(x.repeat(1, 2, 1) for x in (student, ids, probabilities)), 1.0)
    assert float(doubled) == pytest.approx(float(whole), rel=1e-5)


def test_hidden_loss_looks_at_real_places_alone():
    student, teacher = drawn(2, 4, 5, seed=1), drawn(2, 4, 5, seed=2)
    real = torch.tensor([[True, True, True, False], [True, False, False, False]])
    wanted = sum(float((student[b, t] - teacher[b, t]).square().mean()) for b, t in ((0, 0), (0, 1), (0, 2), (1, 0))) / 4
    assert float(hidden_loss(student, teacher, real)) == pytest.approx(wanted, rel=1e-5)
    other = student.clone()
    other[~real] = 1e6
    assert float(hidden_loss(other, teacher, real)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_loss_by_hand(heads):
    student, teacher = drawn(2, heads, 4, 6, seed=1).softmax(-1), drawn(2, 3, 4, 6, seed=2).softmax(-1)
    real = torch.tensor([[True, True, False, False], [True, True, True, False]])
    total = 0.0
    for b, t in real.nonzero().tolist():
        if heads == 3:
            total += sum(float((student[b, h, t] - teacher[b, h, t]).square().sum()) for h in range(3)) / 3
        else:
            total += float((student[b, :, t].mean(0) - teacher[b, :, t].mean(0)).square().sum())
    found = attention_loss(student, teacher, real)
    assert float(found) == pytest.approx(total / 5, rel=1e-5)
    padded = student.clone()
    padded.transpose(1, 2)[~real] = 3.0
    assert float(attention_loss(padded, teacher, real)) == pytest.approx(total / 5, rel=1e-5)


# ---- what the heads of a student learn tokens from


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ensembles_against_whole_distributions(temperature):
    """Three heads, three teachers, all 12 pieces kept (in an order of each teacher's own): sums of plain KLs."""
    heads, n, v = 3, 4, 12
    mine, theirs = drawn(heads, n, v, seed=1) / temperature, drawn(heads, n, v, seed=2) / temperature
    logs, targets = mine.log_softmax(-1), theirs.softmax(-1)
    ids = torch.stack([torch.stack([torch.randperm(v) for _ in range(n)]) for _ in range(heads)])
    best = targets.gather(-1, ids)

    def kl_of(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p * (p.log() - q)).sum(-1).mean()) * temperature**2

    def goal(ensemble: str) -> Goal:
        return Goal(("tokens",), temperature=temperature, token_weight=0.8, ensemble=ensemble)

    own = [kl_of(targets[i], logs[i]) for i in range(heads)]
    found = ensemble_loss(logs.gather(-1, ids), best, goal("each"))
    assert float(found) == pytest.approx(sum(own) / 3, rel=1e-4)
    asked = ids.transpose(0, 1).flatten(1).expand(heads, -1, -1)  # every head's, at every teacher's pieces
    found = ensemble_loss(logs.gather(-1, asked), best, goal("all"))
    every = [kl_of(targets[j], logs[i]) for i in range(heads) for j in range(heads)]
    assert float(found) == pytest.approx(sum(every) / 9, rel=1e-4)
    found = ensemble_loss(logs.gather(-1, asked), best, goal("running"))
    before = [kl_of(logs[:i].exp().mean(0), logs[i]) for i in (1, 2)]
    wanted = (own[0] + (own[1] + before[0]) / 2 + (own[2] + before[1]) / 2) / 3
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_a_head_does_not_teach_by_changing_itself():
    logs = drawn(2, 4, 3, seed=1).log_softmax(-1).requires_grad_()
    best = drawn(1, 4, 3, seed=2).softmax(-1)
    ensemble_loss(logs, best, Goal(("tokens",), token_weight=0.8, ensemble="running")).backward()
    alone = logs.detach()[:1].requires_grad_()
    (token_loss(alone[0], best[0], 1.0) / 2).backward()
    torch.testing.assert_close(logs.grad[0], alone.grad[0])
