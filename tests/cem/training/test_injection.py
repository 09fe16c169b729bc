"""How the gradients of classification and of terms meet in the encoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cem
from cem.defenses import Chain
from cem.models import SplitModel
from cem.training.injection import INJECTIONS, Step, combined
from cem.training.meter import EpochMeter
from cem.training.weighted import WeightedTerm
from cem_kernels.validation import as_labels

LAMBDA = 3.5
each_injection = pytest.mark.parametrize("inject", INJECTIONS.values(), ids=INJECTIONS)


class Spread(cem.Term):
    """A smooth penalty with a parameter: the log variance of a projection of the batch."""

    def __init__(self, loss_factor=1.0):
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        self.loss_factor = loss_factor
        self.seen, self.steps = [], []

    def before_step(self, batch):
        self.steps.append(batch)

    def measure(self, batch):
        self.seen.append(batch)
        variance = (batch.features.flatten(1) @ self.weight).var(dim=0)
        loss = variance.add(1e-3).log().mean() * self.loss_factor
        return cem.Measured(loss, {"intra_mse": variance.mean()}, own_loss=loss)


class InfiniteGradient(Spread):
    """A penalty that is finite and has a gradient that is not: the square root at zero."""

    def measure(self, batch):
        loss, monitors, _ = super().measure(batch)
        return cem.Measured(loss + (batch.features - batch.features.detach()).abs().sum().sqrt(), monitors)


class OfBoth(Spread):
    """Depends on the features and on what the defenses made of them."""

    def measure(self, batch):
        loss, monitors, _ = super().measure(batch)
        loss = loss + (batch.sent * batch.features).square().mean()
        return cem.Measured(loss, monitors, own_loss=loss)


class Taught(OfBoth):
    """Trains its own parameter on a loss of its own."""

    def measure(self, batch):
        loss, monitors, _ = super().measure(batch)
        return cem.Measured(loss, monitors, own_loss=(self.weight - batch.sent.mean()).square().sum())


class Adversary(OfBoth):
    """Trains its parameter in every step, and on nothing besides."""

    def before_step(self, batch):
        super().before_step(batch)
        self.weight.square().sum().backward()

    def measure(self, batch):
        return super().measure(batch)._replace(own_loss=None)


class Constant(cem.Term):
    """Depends on nothing."""

    def measure(self, batch):
        return cem.Measured(torch.ones((), dtype=torch.float64), {})


class Double(cem.Defense):
    def transform(self, z):
        return z * 2


class Squash(cem.Defense):
    """Depends on the features in another way at every value, and has a parameter, and a term that is a part of it."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.spread = OfBoth()

    def transform(self, z):
        return (self.slope * z).tanh() * z


def network(*defenses, noise_std=0.3):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh())
    server = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    chain = Chain({str(n): each for n, each in enumerate((*defenses, cem.GaussianNoise(noise_std)))})
    return SplitModel(encoder, server, image_shape=(1, 4, 4), defense=chain).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(12) % 3


def weighted(*terms, weight=LAMBDA):
    """Terms with this weight, half of it, a third, and so on."""
    found = [
        WeightedTerm(f"term{n}", "", term, lambda _, n=n: weight / n, 0, torch.device("cpu"))
        for n, term in enumerate(terms, start=1)
    ]
    for each in found:
        each.before_epoch(0, 1)
    return found


def gradients(inject, *terms, defenses=(), weight=LAMBDA):
    """Gradients of a fresh model's parameters, and then of the terms', after one step."""
    model = network(*defenses)
    torch.manual_seed(2)
    step = inject(model, weighted(*terms, weight=weight), *batch())
    parameters = [*model.parameters(), *(each for term in terms for each in term.parameters())]
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters], step


def plain_sum(model, terms, images, labels):
    """The textbook: one backward of the sum."""
    z = model.encoder(images)
    sent = model.defense(z)
    logits = model.server(sent)
    cross_entropy = F.cross_entropy(logits, labels)
    answers = {each.key: each.term.measure(cem.Batch(images, labels, z, sent)) for each in terms}
    sum([cross_entropy, *(each.now * answers[each.key].loss for each in terms)]).backward()
    return Step(cross_entropy, (logits.argmax(1) == labels).sum(), answers)


def assert_equal(ours, expected):
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


@each_injection
@pytest.mark.parametrize("defense", [None, Double, Squash], ids=["noise alone", "doubled", "squashed"])
@pytest.mark.parametrize("terms", [(Spread,), (OfBoth,), (OfBoth, Spread, Constant), ()], ids=len)
def test_gradient_is_that_of_the_weighted_sum_and_what_is_measured_that_of_the_batch(inject, terms, defense):
    (ours, step), (expected, wanted) = (
        gradients(way, *(each() for each in terms), defenses=[] if defense is None else [defense()])
        for way in (inject, plain_sum)
    )
    assert_equal(ours, expected)
    assert_equal([step.cross_entropy, step.correct], [wanted.cross_entropy, wanted.correct])
    for (key, answer), (wanted_key, measured) in zip(step.answers.items(), wanted.answers.items(), strict=True):
        assert (key, answer.finite) == (wanted_key, True)
        torch.testing.assert_close((answer.loss, answer.monitors), (measured.loss, measured.monitors))


@each_injection
def test_term_that_is_a_part_of_its_defense_gets_its_gradient_once(inject):
    squashes = Squash(), Squash()
    found = [
        gradients(way, each.spread, defenses=[each])[0] for way, each in zip((inject, plain_sum), squashes, strict=True)
    ]
    assert_equal(*found)


@each_injection
def test_loss_of_its_own_trains_a_terms_parameters_with_the_terms_weight(inject):
    taught, model = Taught(), network()
    ours, _ = gradients(inject, taught)
    assert_equal(ours[:-1], gradients(inject, OfBoth())[0][:-1])
    torch.manual_seed(2)
    sent = model.defense(model.encoder(batch()[0])).detach()
    assert_equal(ours[-1:], [LAMBDA * 2 * (taught.weight - sent.mean()).detach()])


@each_injection
def test_parameters_without_a_loss_of_their_own_are_not_trained_and_what_an_adversary_leaves_is_cleared(inject):
    ours, _ = gradients(inject, Adversary())
    assert_equal(ours[:-1], gradients(inject, OfBoth())[0][:-1])
    assert not ours[-1].any()


@each_injection
def test_term_without_a_weight_measures_nothing_and_may_train_an_adversary(inject):
    adversary = Adversary()
    ours, step = gradients(inject, adversary, weight=0.0)
    assert_equal(ours, [*gradients(inject)[0], torch.zeros(8, 8, dtype=torch.float64)])
    assert (len(adversary.steps), adversary.seen, step.answers) == (1, [], {})


@each_injection
def test_term_sees_images_labels_clean_features_and_what_is_sent(inject):
    spread = Spread()
    gradients(inject, spread, defenses=[Double()])
    images, labels = batch()
    model = network(Double())
    torch.manual_seed(2)
    z = model.encoder(images)
    for found in (*spread.steps, *spread.seen):
        assert torch.equal(found.images, images)
        assert torch.equal(found.labels, labels)
        assert torch.equal(found.features, z)
        assert (found.sent - 2 * z).std().item() == pytest.approx(0.3, rel=0.2)
    assert not any(each.requires_grad for each in (spread.steps[0].features, spread.steps[0].sent))


@each_injection
def test_under_amp_the_network_is_bfloat16_and_what_crosses_the_cut_is_not(inject):
    model, spread = network().float(), Spread().float()
    seen = {}
    model.encoder[0].register_forward_hook(lambda _, __, out: seen.update(encoder=out.dtype))
    model.server[1].register_forward_hook(lambda _, __, out: seen.update(server=out.dtype))
    model.defense.register_forward_hook(lambda _, __, out: seen.update(defense=out.dtype))
    images, labels = batch()
    step = inject(model, weighted(spread), images.float(), labels, amp=True)
    assert seen == {"encoder": torch.bfloat16, "server": torch.bfloat16, "defense": torch.float32}
    assert spread.seen[0].features.dtype == spread.seen[0].sent.dtype == torch.float32
    assert step.cross_entropy.dtype == step.answers["term1"].loss.dtype == torch.float32


@each_injection
@pytest.mark.parametrize("broken", [Spread(float("nan")), InfiniteGradient()], ids=["NaN", "infinite gradient"])
def test_step_in_which_a_term_is_not_finite_follows_the_other_losses_alone(inject, broken):
    broken.zero_grad()
    ours, step = gradients(inject, OfBoth(), broken)
    alone, _ = gradients(inject, OfBoth())
    for got, wanted in zip(ours[:-1], alone, strict=True):  # the broken one's come last
        assert torch.equal(got.view(torch.int64), wanted.view(torch.int64))
    assert torch.equal(ours[-1], torch.zeros_like(ours[-1]))
    assert [answer.finite.item() for answer in step.answers.values()] == [True, False]


@pytest.mark.parametrize("defenses", [[], [Double()]], ids=["nothing", "doubled"])
def test_combined_joins_the_two_sides_by_what_crosses_the_cut_alone(defenses):
    """What a split system needs: the server's side works from a leaf, and the encoder runs backward once."""
    model, inputs, backward = network(*defenses, noise_std=0.0), [], []
    model.server.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.encoder[1].register_full_backward_hook(lambda *_: backward.append(1))
    combined(model, weighted(OfBoth(), Spread()), *batch())
    assert inputs[0].is_leaf
    assert len(backward) == 1


@pytest.mark.parametrize("name", ["centroid", "mixture", "attention"])
def test_labels_are_checked_once_a_step(name, monkeypatch):
    context = cem.Context(feature_shape=(2, 2, 2), image_shape=(1, 4, 4), num_classes=3, noise_std=0.3)
    term, model, (images, labels) = cem.SURROGATES.build(name, context), network().float(), batch()
    images = images.float()
    term.after_epoch(model.encoder(images).detach(), labels)
    checks = []

    def checked(labels, num_classes):
        checks.append(num_classes)
        return as_labels(labels, num_classes)

    for module in ("cem_kernels.validation", "cem.surrogates.mixture"):
        monkeypatch.setattr(f"{module}.as_labels", checked)
    combined(model, weighted(term), images, labels)
    assert checks == [3]


@each_injection
@pytest.mark.parametrize("trained", [False, True])
def test_step_and_its_measurement_never_wait_for_the_device(inject, trained):
    """Tensors on the meta device have no values: whatever asks for one raises."""
    model, taught = network(Double()).to("meta"), Taught().requires_grad_(trained).to("meta")
    images, labels = (tensor.to("meta") for tensor in batch())
    meter = EpochMeter(torch.device("meta"))
    meter.add(inject(model, weighted(taught), images, labels), len(labels))
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()
