"""The digits problems: their data and their networks."""

import torch

from dhf.problems import build_problem


def test_the_autoencoder_is_the_one_described():
    torch.manual_seed(0)
    problem = build_problem("digits-autoencoder", {})
    layers = [m for m in problem.objective.module if isinstance(m, torch.nn.Linear)]
    assert [layers[0].in_features, *(m.out_features for m in layers)] == [64, 100, 50, 25, 6, 25, 50, 100, 64]
    images, targets = problem.train
    assert images.shape == (1797, 64)
    assert images is targets
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    x = images.float()
    z = problem.objective.outputs((x, x)).detach()
    p = torch.sigmoid(z.double())
    nats = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(problem.objective.loss(z, (x, x)).double(), nats, rtol=1e-5, atol=0.0)
    assert 50 < float(nats) < 70


def test_the_classifier_holds_out_360_images_that_it_does_not_train_on():
    problem = build_problem("digits-classifier", {})
    (train, _), (held_out, labels) = problem.train, problem.validation
    assert (len(train), len(held_out)) == (1437, 360)
    assert labels.dtype == torch.int64
    both = torch.cat([train, held_out])
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data / 16.0)
    assert torch.equal(both.sum(0), everything.sum(0))
    again = build_problem("digits-classifier", {}).train[0]
    assert torch.equal(again, train)
    assert not torch.equal(build_problem("digits-classifier", {"seed": 1}).train[0], train)
